"""How an engine is shared among ranks: which pieces of its graphs and which files belong to each of them.

A graph is cut where ranks add up, and between pipeline stages. What goes from piece to piece says by its name where:
`partial.N` is added up over the ranks of a stage and is `sum.N` for later pieces, `local.N` stays on the rank, and
`intermediate_out.N` is `intermediate.N` of the next stage.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import EngineError
from seekforge.common.records import Record, RecordError
from seekforge.formats.engine.weight_file import constant_bytes, own_layout
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.program import GraphIO, TensorSpec
from seekforge.formats.weight_recipes import Recipe

#: Starts of those names.
PARTIAL: Final = "partial."
SUM: Final = "sum."
LOCAL: Final = "local."
_HANDED_ON: Final = "intermediate_out."
_RECEIVED: Final = "intermediate."


class Ranks(Record):
    """The layout of an engine of several ranks.

    Attributes:
        parallelism: how many ranks there are, and how they share the model.
        pipeline_stages: [a, b) of the layers of each stage.
        pieces: graph -> for each stage, the names of its pieces in order: files of `Manifest.stages` without their
            endings. Ranks of a stage run the same pieces.
        stage_bytes: GPU: what a rank of each stage is expected to hold, under the keys of `Audit.device_bytes`.
    """

    parallelism: Parallelism
    pipeline_stages: tuple[tuple[int, int], ...]
    pieces: dict[str, tuple[tuple[str, ...], ...]]
    stage_bytes: tuple[dict[str, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallelism.dp != 1 or not 2 <= self.parallelism.num_ranks <= 4096:
            raise RecordError(f"is {self.parallelism}, expected one replica of 2 to 4096 ranks", ("parallelism",))
        for graph, stages in self.pieces.items():
            if len(stages) != self.parallelism.pp:
                raise RecordError(f"has {len(stages)} stages, expected {self.parallelism.pp}", ("pieces", graph))

    def stems(self, stage: int) -> list[str]:
        """Return the names of all pieces of a stage, those of the main graph first."""
        return [stem for stages in self.pieces.values() for stem in stages[stage]]

    def pieces_of(self, graph: str, pieces: Sequence[GraphIO], stage: int) -> list[GraphIO]:
        """Return those of a graph's pieces that the ranks of a stage run, in order."""
        stages = self.pieces.get(graph, ())
        if not stages:
            return []
        first = sum(len(names) for names in stages[:stage])
        return list(pieces[first : first + len(stages[stage])])

    def weight_file(self, rank: int) -> str:
        """Return the name of the file with the part of the weights that a rank alone has."""
        return f"weights.rank{rank}.bin"

    def own_constants(
        self, folder: Path, bindings: Mapping[str, Mapping[str, Recipe]], rank: int
    ) -> dict[str, dict[str, np.ndarray]]:
        """Return piece -> constant -> value of what ranks divide, mapped from the rank's own file.

        Args:
            folder: the engine folder.
            bindings: piece -> constant -> recipe.
            rank: the rank.

        Raises:
            EngineError: the file is of another size.
        """
        stems = self.stems(self.parallelism.coordinates(rank).pp_rank)
        offsets, size = own_layout({stem: bindings[stem] for stem in stems})
        if not size:
            return {}
        path = folder / self.weight_file(rank)
        if path.stat().st_size != size:
            raise EngineError(f"{path}: {path.stat().st_size} bytes, its constants take {size}; build the engine again")
        mapped = np.memmap(path, np.uint8, mode="r")
        values: dict[str, dict[str, np.ndarray]] = {}
        for stem, places in offsets.items():
            for name, offset in places.items():
                recipe = bindings[stem][name]
                piece = mapped[offset : offset + constant_bytes(recipe)]
                values.setdefault(stem, {})[name] = piece.view(NUMPY[recipe.dtype]).reshape(recipe.shape)
        return values


def sum_name(partial: str) -> str:
    """Return the name of the sum of what pieces give under a name."""
    return SUM + partial.removeprefix(PARTIAL)


def crossing(stages: Sequence[Sequence[GraphIO]], border: int) -> dict[str, TensorSpec]:
    """Return what goes over the border before a pipeline stage: `intermediate.N` -> its specification, in order.

    That is what the stages behind it read before any of them makes it. Some may come from far before, and go far on.

    Args:
        stages: the pieces of each stage of one graph, in order.
        border: the stage behind the border.
    """
    crosses: dict[str, TensorSpec] = {}
    made: set[str] = set()
    for piece in itertools.chain.from_iterable(stages[border:]):
        for spec in piece.with_role("intermediate"):
            if spec.name.startswith(_RECEIVED) and spec.name not in made:
                crosses.setdefault(spec.name, spec)
        made.update(received_name(spec.name) for spec in piece.outputs if is_handed_on(spec.name))
    return crosses


def joined(pieces: Sequence[GraphIO]) -> GraphIO:
    """Return what pieces take and give together, without what they hand to each other; its file is the first's."""
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    for piece in pieces:
        inputs |= {spec.name: spec for spec in piece.inputs if spec.role != "intermediate" and spec.name not in inputs}
        outputs |= {spec.name: spec for spec in piece.outputs if spec.role != "intermediate"}
        aliases |= piece.aliases
    return replace(pieces[0], inputs=tuple(inputs.values()), outputs=tuple(outputs.values()), aliases=aliases)


def shown_name(rank: int, name: str) -> str:
    """Return the name under which a rank of a CPU engine shows a tensor that it has for itself, such as
    `rank1.attn_out.3`; by the bare name the first rank of the stage shows it."""
    return f"rank{rank}.{name}"


def bare_name(name: str) -> str:
    """Return the name of what `shown_name` names."""
    return re.sub(r"^rank\d+\.", "", name)


def is_handed_on(name: str) -> bool:
    """Whether a value goes to the next pipeline stage."""
    return name.startswith(_HANDED_ON)


def received_name(name: str) -> str:
    """Return the name under which the next stage takes it."""
    return _RECEIVED + name.removeprefix(_HANDED_ON)


def is_handed(name: str) -> bool:
    """Whether a piece hands a value of this name to another, or takes it from one."""
    return name.startswith((PARTIAL, SUM, LOCAL, _RECEIVED, _HANDED_ON))
