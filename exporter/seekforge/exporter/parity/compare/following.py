"""Whose keys and experts a run of PyTorch goes on with: another run's, where those tie with its own but for noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from seekforge.exporter.models.shared.layer_operations import LayerModule, LayerState, Op
from seekforge.exporter.models.shared.moe import Moe
from seekforge.exporter.parity.compare.metrics import different, expert_gaps, key_gaps
from seekforge.exporter.parity.compare.selections import FLOOR_EXPERTS, FLOOR_KEYS
from seekforge.formats.dump import Dump
from seekforge.formats.step_io import TOPK_INDICES

#: Inputs of a layer differ by noise too, so its scores do by more than those of the same inputs.
_TIMES: Final = 4.0


class Follower:
    """Replaces rows of a choice by another run's.

    Args:
        other: the dump of that run.
    """

    def __init__(self, other: Dump) -> None:
        self._other = other

    def __call__(
        self, step: int, op: Op, values: Mapping[str, Tensor], state: LayerState, module: LayerModule
    ) -> Tensor:
        """Return the keys or experts to go on with.

        Args:
            step: the number of the step over all cases.
            op: the operation that chooses.
            values: what the run has, its own choice under `op.output`: [B, Q, TOPK] or [B·Q, TOPK] int32.
            state: what it has cached for the layer.
            module: the layer.

        Returns:
            The run's own choice, but for rows in which the other one chose others, all of them nearer to the boundary
            than noise takes them.
        """
        chosen, name = values[op.output], f"{op.output}.{module.layer}"
        if not self._other.has(step, name):
            return chosen
        rows, other_rows = _rows(chosen), _rows(torch.from_numpy(np.array(self._other.tensor(step, name))))
        real = self._other.arrays(step).real
        differ = np.flatnonzero((np.sort(rows, -1) != np.sort(other_rows, -1)).any(-1) & real)
        if not len(differ):
            return chosen
        keys = op.output == TOPK_INDICES
        scores = _rows(module.key_scores(state, values) if keys else _biased_scores(module, values))
        followed = rows.copy()
        for row in differ:
            changed = np.concatenate(different(other_rows[row], rows[row]))
            if keys:
                visible = scores[row][np.isfinite(scores[row])]
                near = key_gaps(visible, rows[row], changed) <= _TIMES * FLOOR_KEYS
            else:
                groups = module.config.n_group, module.config.topk_group
                near = expert_gaps(scores[row], rows[row], changed, *groups) <= _TIMES * FLOOR_EXPERTS
            if near.all():
                followed[row] = other_rows[row]
        return torch.from_numpy(followed).view_as(chosen)


def _biased_scores(module: LayerModule, values: Mapping[str, Tensor]) -> Tensor:
    moe = module.module.mlp
    assert isinstance(moe, Moe)
    return moe.gate.biased_scores(values["router_logits"])


def _rows(tensor: Tensor) -> np.ndarray:
    """Return [B·Q, width] of [B, Q, width] or of itself."""
    flat = tensor.flatten(0, -2)
    return (flat.float() if flat.is_floating_point() else flat).numpy()
