"""Steps of pipeline stages in parts: a stage works on one part while the next stage works on the one before.

A part is some columns of a step, the next tokens of each of its rows, or some of its rows, other sequences: whichever
there are more of. Stages take the parts in order, so what a part reads of the caches is there, as with prompts that are
prefilled in chunks. Steps of few tokens stay whole: each part reads the weights of its stage, and of routed experts
few tokens need nearly all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from seekforge.formats.step_io import ROW_RESULTS, StepInputs

#: Tokens that a part has at least. Two parts in two stages are worth it where half of the tokens take less than two
#: thirds of the time; below that, reading the experts twice costs more than idle stages. By the forecast of `plan` for
#: the 671B model on H200 (tp 8, ep, pp 2) 256 sequences at 8K of context take a quarter longer in two parts, 1,024
#: as long, and at 64K 0.85 of the time. Two stages of `tiny` on two busy cores broke even at parts of 128
#: (2026-12-01).
LEAST_TOKENS: Final = 512


@dataclass(frozen=True)
class Part:
    """A micro-batch.

    Attributes:
        inputs: a step of some rows or columns of the whole.
        wanted: [N] int64, which of the whole's rows of logits it gives.
        axis: what was cut: 0 rows, 1 columns.
    """

    inputs: StepInputs
    wanted: np.ndarray
    axis: int


def num_parts(inputs: StepInputs, num_stages: int) -> int:
    """Return in how many parts a step goes through so many stages."""
    return max(1, min(num_stages, inputs.input_ids.size // LEAST_TOKENS, max(inputs.input_ids.shape)))


def split_step(inputs: StepInputs, count: int) -> list[Part]:
    """Return a step as parts of rows or columns.

    A part that gives no logits asks for its first row all the same, which a step must.

    Args:
        inputs: a step of the model's graph.
        count: how many parts; at most its rows, or its columns where those are not fewer.
    """
    rows, width = inputs.input_ids.shape
    axis = 1 if width >= rows else 0
    row, column = np.divmod(inputs.logits_index, width)
    place, size = (column, width) if axis else (row, rows)
    parts = []
    for number in range(count):
        start, stop = size * number // count, size * (number + 1) // count
        wanted = np.nonzero((place >= start) & (place < stop))[0]
        if axis:
            picked = row[wanted] * (stop - start) + column[wanted] - start
        else:
            picked = inputs.logits_index[wanted] - start * width
        cut = (slice(None), slice(start, stop)) if axis else (slice(start, stop),)
        part = replace(
            inputs,
            input_ids=inputs.input_ids[cut],
            positions=inputs.positions[cut],
            slot_mapping=inputs.slot_mapping[cut],
            block_table=inputs.block_table if axis else inputs.block_table[cut],
            logits_index=picked if len(picked) else np.zeros(1, np.int64),
            intermediate_tensors={name: value[cut] for name, value in inputs.intermediate_tensors.items()},
        )
        parts.append(Part(part, wanted, axis))
    return parts


def join_parts(results: Sequence[Mapping[str, np.ndarray]], parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """Return the results of a step from those of its parts.

    Args:
        results: the results of each part, by name: rows of logits, [B, Q, ...] of at least three axes, or
            [B * Q, width].
        parts: what `split_step` made of the step.
    """
    if len(parts) == 1:
        return dict(results[0])
    axis = parts[0].axis
    rows = parts[0].inputs.input_ids.shape[0]
    joined: dict[str, np.ndarray] = {}
    for name, first in results[0].items():
        values = [one[name] for one in results]
        if name in ROW_RESULTS:
            joined[name] = np.empty((sum(len(part.wanted) for part in parts), *first.shape[1:]), first.dtype)
            for value, part in zip(values, parts, strict=True):
                joined[name][part.wanted] = value[: len(part.wanted)]
        elif first.ndim > 2 or axis == 0:
            joined[name] = np.concatenate(values, axis=axis)
        else:
            by_row = [value.reshape(rows, -1, *value.shape[1:]) for value in values]
            joined[name] = np.concatenate(by_row, axis=1).reshape(-1, *first.shape[1:])
    return joined
