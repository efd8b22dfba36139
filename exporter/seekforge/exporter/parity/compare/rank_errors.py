"""Where an operation of several ranks is wrong: each rank's part of it is compared with PyTorch's same part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from seekforge.exporter.models import family_of
from seekforge.exporter.models.shared.coded import CodedExperts
from seekforge.exporter.models.shared.layer_operations import NEXT
from seekforge.exporter.models.shared.moe import Experts
from seekforge.exporter.parity.compare.metrics import row_errors
from seekforge.exporter.parity.engine_copy import DENSE_PART
from seekforge.exporter.parity.sides.rank_dump import RankDump
from seekforge.exporter.parity.sides.torch_streams import Judged
from seekforge.formats.quantization import nvfp4

_LOGITS: Final = "logits"
Rows = Callable[[np.ndarray], np.ndarray]


def rank_errors(
    ranks: RankDump, judged: Judged, expected: np.ndarray, actual: np.ndarray, gate: float, rows: Rows
) -> dict[int, float]:
    """Return the ranks that gave something else than PyTorch -> their largest row error.

    Args:
        ranks: what each of them had.
        judged: an operation of one step, on what they have together.
        expected, actual: PyTorch's and the engine's rows of its output.
        gate: what an error may be.
        rows: makes such rows of an array.
    """
    op, layer, taps = judged.op, judged.layer, family_of(ranks.config).taps
    how, members = ranks.divided.get(op.output), ranks.members(layer)
    if how is None and op.module not in (taps.embedding, taps.dense_output) and op.output != _LOGITS:
        point = NEXT.get(op.output, op.output)
        name = f"{point}.{layer + (op.output in NEXT)}"
        if not ranks.dump.has(judged.step, name):
            return {}
        parts = enumerate(ranks.parts(judged.step, name).values())
        return _beyond({members[i]: (rows(part), expected) for i, part in parts}, gate)
    if not (row_errors(actual, expected) > gate).any():
        return {}
    if op.module == taps.embedding:
        return _of_tokens(ranks, judged.step, row_errors(actual, expected), gate)
    if op.output == _LOGITS:
        divides = ranks.ranks.parallelism.divides_vocabulary(ranks.config)
        return _of_columns(members, expected, actual, gate, pairs=False) if divides else {}
    is_dense = op.module == taps.dense_output
    if is_dense or how == "sum":
        point = DENSE_PART if is_dense else op.output
        return _of_summands(ranks, judged, f"{point}.{layer}", gate, rows)
    pairs = how == "pairs" and not op.parts  # else gate and up come one by one
    return _of_columns(members, expected, actual, gate, pairs=pairs)


def other_choices(ranks: RankDump, step: int, name: str) -> list[int]:
    """Return the ranks of a stage that chose otherwise than its first, by the tensor of what was chosen."""
    if not ranks.dump.has(step, name):
        return []
    first, *others = (np.sort(part, -1) for part in ranks.parts(step, name).values())
    members = ranks.members(int(name.rpartition(".")[2]))
    return [members[i] for i, part in enumerate(others, 1) if not np.array_equal(part, first)]


def _beyond(compared: Mapping[int, tuple[np.ndarray, np.ndarray]], gate: float) -> dict[int, float]:
    """Return the ranks whose pair of (actual, expected) rows lies beyond the gate -> the largest error."""
    errors = {rank: float(row_errors(*pair).max(initial=0)) for rank, pair in compared.items()}
    return {rank: error for rank, error in errors.items() if not error <= gate}


def _of_columns(
    members: range, expected: np.ndarray, actual: np.ndarray, gate: float, *, pairs: bool
) -> dict[int, float]:
    """Return whose columns are wrong."""

    def columns(values: np.ndarray, place: int) -> np.ndarray:
        halves = np.split(values, 2 if pairs else 1, axis=-1)
        return np.concatenate([np.split(half, len(members), axis=-1)[place] for half in halves], axis=-1)

    return _beyond({rank: (columns(actual, i), columns(expected, i)) for i, rank in enumerate(members)}, gate)


def _of_tokens(ranks: RankDump, step: int, errors: np.ndarray, gate: float) -> dict[int, float]:
    """Return whose rows of the embedding are wrong."""
    parallelism, arrays = ranks.ranks.parallelism, ranks.dump.arrays(step)
    if not parallelism.divides_vocabulary(ranks.config):
        return {}
    owner = arrays.input_ids.reshape(-1)[arrays.real] // parallelism.rank_sizes(ranks.config).vocab_size
    return {int(rank): float(errors[owner == rank].max()) for rank in np.unique(owner[errors > gate])}


def _of_summands(ranks: RankDump, judged: Judged, name: str, gate: float, rows: Rows) -> dict[int, float]:
    """Return whose summand is wrong: PyTorch computes each with the weights of that rank alone."""
    if judged.module is None or not ranks.dump.has(judged.step, name):
        return {}
    module = judged.module.module.get_submodule(judged.op.module)
    members = ranks.members(judged.layer)
    compared: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for place, part in enumerate(ranks.parts(judged.step, name).values()):
        with _weights_of(module, place, len(members), is_dealt=ranks.ranks.parallelism.ep):
            expected = judged.op.run(judged.inputs)
        compared[members[place]] = (rows(part), rows(expected.float().numpy()))
    return _beyond(compared, gate)


@contextlib.contextmanager
def _weights_of(module: nn.Module, place: int, num_ranks: int, *, is_dealt: bool) -> Iterator[None]:
    """Let a product that ranks add up have the weights of one of them, and zeros for those of the others."""
    has_experts = isinstance(module, Experts | CodedExperts)
    parameter = getattr(module, "w2" if has_experts else "weight")
    whole: Tensor = parameter.data
    axis = 0 if has_experts and is_dealt else whole.dim() - 1
    width = whole.shape[axis]
    part = torch.zeros(whole.shape, dtype=torch.float32).to(whole.dtype)
    if isinstance(module, Experts) and whole.dtype == torch.int8 and axis:  # rows of NVFP4: scales stand behind codes
        width = width * nvfp4.BLOCK // 2 // nvfp4.row_bytes(nvfp4.BLOCK)
        part[..., width:] = whole[..., width:]
    size = width // num_ranks
    part.narrow(axis, place * size, size).copy_(whole.narrow(axis, place * size, size))
    parameter.data = part
    try:
        yield
    finally:
        parameter.data = whole
