"""What single ranks of an engine had inside layers, and what they had together.

Ranks divide points as the family says (`Taps.divided`). Together they are the tensors of an engine of one rank, which
PyTorch judges as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seekforge.exporter.models import family_of
from seekforge.exporter.models.family import Division
from seekforge.exporter.parity.engine_copy import DENSE_PART
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import Dump, DumpWriter
from seekforge.formats.engine.ranks import Ranks, shown_name
from seekforge.formats.step_io import INTERMEDIATE_TENSORS


@dataclass(frozen=True)
class RankDump:
    """The dump of an engine of several ranks, in which each shows what it has for itself.

    Attributes:
        dump: tensors by their names as the first rank of a stage has them, and by `shown_name` of the others.
        ranks: the layout.
        config: the model.
    """

    dump: Dump
    ranks: Ranks
    config: ModelConfig

    @property
    def divided(self) -> Mapping[str, Division]:
        """Points that ranks divide -> how."""
        return family_of(self.config).taps.divided

    def members(self, layer: int) -> range:
        """Return the ranks that have a layer; what lies behind the last layer is on the last stage."""
        tp, stages = self.ranks.parallelism.tp, self.ranks.pipeline_stages
        stage = next((number for number, (_, stop) in enumerate(stages) if layer < stop), len(stages) - 1)
        return range(stage * tp, (stage + 1) * tp)

    def write_whole(self, out: Path) -> Dump:
        """Write the dump that an engine of one rank would have given, into an empty folder."""
        writer = DumpWriter(out, self.dump.side, self.dump.plan)
        for step in range(len(self.dump.cases)):
            names = self.dump.names(step)
            bare = [name for name in names if not name.startswith("rank") and not name.startswith(DENSE_PART)]
            writer.write(step, {name: self._whole(step, name) for name in bare})
        writer.close()
        return Dump.open(out)

    def parts(self, step: int, name: str) -> dict[int, np.ndarray]:
        """Return what each rank has of a tensor in a step, as far as it is shown: the first of its stage always."""
        point, _, layer = name.rpartition(".")
        # what goes into a layer is made by the one before
        first, *others = self.members(max(int(layer) - (point in INTERMEDIATE_TENSORS), 0))
        shown = {rank: shown_name(rank, name) for rank in others}
        parts = {first: self.dump.tensor(step, name)}
        return parts | {
            rank: self.dump.tensor(step, called) for rank, called in shown.items() if self.dump.has(step, called)
        }

    def _whole(self, step: int, name: str) -> np.ndarray:
        point = name.rpartition(".")[0]
        how = self.divided.get(point)
        if how is None:
            return self.dump.tensor(step, name)
        parts = list(self.parts(step, name).values())
        if how == "sum":
            return np.sum(parts, axis=0, dtype=parts[0].dtype)
        if how == "pairs":
            halves = [np.split(part, 2, axis=-1) for part in parts]
            return np.concatenate([half[which] for which in (0, 1) for half in halves], axis=-1)
        return np.concatenate(parts, axis=-2 if point in family_of(self.config).taps.per_head else -1)
