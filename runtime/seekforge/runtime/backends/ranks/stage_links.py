"""What pipeline stages give each other in a step: values on to the next stage, and results to rank 0."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.engine.ranks import crossing
from seekforge.formats.program import GraphIO, TensorSpec
from seekforge.formats.step_io import MODEL, MTP
from seekforge.runtime.backends.ranks.collectives import Collectives
from seekforge.runtime.backends.ranks.message import Message


class StageLinks:
    """The links of one rank to the ranks of its place in the stages beside its own, and to rank 0.

    Attributes:
        received: what comes from the stage before, `intermediate.N` -> its specification.
        handed_on: what the stage behind takes, by the same names.
        is_first: whether this rank is the first of its stage, which gives the stage's results.
    """

    def __init__(self, manifest: Manifest, number: int, collectives: Collectives) -> None:
        assert manifest.ranks is not None
        self._ranks, self._number, self._collectives = manifest.ranks, number, collectives
        self._place = self._ranks.parallelism.coordinates(number)
        self.is_first = self._place.tp_rank == 0
        pp, plans = self._ranks.parallelism.pp, manifest.plans(MODEL)
        stages = [self._ranks.pieces_of(MODEL, plans, stage) for stage in range(pp)]
        self.received: dict[str, TensorSpec] = crossing(stages, self._place.pp_rank) if self._place.pp_rank else {}
        self.handed_on: dict[str, TensorSpec] = crossing(stages, self._place.pp_rank + 1)

    def pieces(self, manifest: Manifest) -> dict[str, list[GraphIO]]:
        """Return graph -> its pieces that this rank runs, in order; graphs of which it runs none are left out."""
        return {
            graph: pieces
            for graph in manifest.graphs
            if (pieces := self._ranks.pieces_of(graph, manifest.plans(graph), self._place.pp_rank))
        }

    def receive(self) -> dict[str, np.ndarray]:
        """Return what the stage before hands on in this step."""
        if not self._place.pp_rank:
            return {}
        source = self._number - self._ranks.parallelism.tp
        return dict(self._collectives.send(None, source=source, target=self._number).arrays)

    def hand_on(self, values: Mapping[str, np.ndarray]) -> None:
        """Give the stage behind what it takes of these values."""
        if self.handed_on:
            arrays = {name: values[name] for name in self.handed_on}
            target = self._number + self._ranks.parallelism.tp
            self._collectives.send(Message(arrays=arrays), source=self._number, target=target)

    def collect(self, graph: str, results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return on rank 0 the results of all stages of a step; on the others their own, which went to rank 0."""
        parallelism = self._ranks.parallelism
        last = parallelism.pp - 1
        for other in range(1, parallelism.pp):
            if (graph == MTP and other != last) or self._number not in (0, other * parallelism.tp):
                continue
            message = Message(arrays=results) if self._number else None
            results |= self._collectives.send(message, source=other * parallelism.tp, target=0).arrays
        return results


def wanted_of(outputs: Collection[str], pieces: Collection[GraphIO]) -> list[str]:
    """Return those of the outputs that some pieces give."""
    outer = {spec.name for piece in pieces for spec in piece.outputs}
    return [name for name in outputs if name in outer]
