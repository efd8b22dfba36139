"""What of an engine one device runs: all of it, or the part of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.engine.ranks import joined
from seekforge.formats.program import GraphIO, TensorSpec
from seekforge.formats.step_io import MODEL
from seekforge.formats.weight_recipes import Recipe, for_rank, tensors_of


class Links(Protocol):
    """What a rank has of the pipeline stages beside its own."""

    received: dict[str, TensorSpec]
    handed_on: dict[str, TensorSpec]

    def pieces(self, manifest: Manifest) -> dict[str, list[GraphIO]]:
        """Return graph -> its plans that this rank runs, in order."""
        ...

    def receive(self) -> dict[str, np.ndarray]:
        """Return what the stage before hands on in this step."""
        ...

    def hand_on(self, values: Mapping[str, np.ndarray]) -> None:
        """Give the stage behind what it takes of these values."""
        ...


@dataclass(frozen=True)
class Part:
    """Graphs, plans and weights of one device.

    Attributes:
        plans: graph -> what a step of it runs here, in order.
        bindings: graph -> weight or table -> how it comes from the checkpoint, on this rank.
        links: what it has of other stages; None: this device runs all of them.
    """

    plans: dict[str, Sequence[GraphIO]]
    bindings: Mapping[str, Mapping[str, Recipe]]
    links: Links | None = None

    def whole(self, graph: str, manifest: Manifest) -> GraphIO:
        """Return what the plans of a graph take and give together."""
        return manifest.graphs[graph] if self.links is None else joined(self.plans[graph])

    def receives(self, graph: str) -> Sequence[TensorSpec]:
        """Return what comes from the stage before in a step of a graph."""
        return () if self.links is None or graph != MODEL else tuple(self.links.received.values())

    def hands_on(self, graph: str) -> Sequence[TensorSpec]:
        """Return what goes to the stage behind in a step of a graph."""
        return () if self.links is None or graph != MODEL else tuple(self.links.handed_on.values())

    def changed(self, names: set[str]) -> dict[str, dict[str, Recipe]]:
        """Return what reads any of some tensors of the checkpoint: graph -> weight -> recipe."""
        return {
            graph: {name: recipe for name, recipe in recipes.items() if tensors_of(recipe) & names}
            for graph, recipes in self.bindings.items()
        }


def whole_part(manifest: Manifest, bindings: Mapping[str, Mapping[str, Recipe]]) -> Part:
    """Return all of an engine."""
    return Part({graph: manifest.plans(graph) for graph in manifest.graphs}, bindings)


def rank_part(manifest: Manifest, bindings: Mapping[str, Mapping[str, Recipe]], number: int, links: Links) -> Part:
    """Return what one rank has of an engine of several.

    Args:
        manifest: the manifest of the engine.
        bindings: those of the engine, graph -> weight -> recipe.
        number: the rank.
        links: its links to other stages.
    """
    assert manifest.ranks is not None
    parallelism = manifest.ranks.parallelism
    tp_rank = parallelism.coordinates(number).tp_rank
    plans = links.pieces(manifest)
    sliced: dict[str, dict[str, Recipe]] = {}
    for graph, ios in plans.items():
        names = {spec.name for io in ios for spec in io.inputs if spec.role in ("weight", "table")}
        recipes = bindings.get(graph, {})
        sliced[graph] = {name: for_rank(recipes[name], parallelism, tp_rank) for name in names if name in recipes}
    return Part({graph: tuple(ios) for graph, ios in plans.items()}, sliced, links)
