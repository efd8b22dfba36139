"""Long steps of pipeline stages in parts: a stage works on one part while the next stage works on the one before.

A part is some columns of a step: the next tokens of each of its rows. Stages take the parts in order, so what a part
reads of the caches is there, as with prompts that are prefilled in chunks. Steps of few tokens stay whole: each part
reads all weights of its stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from seekforge.formats.step_io import ROW_RESULTS, StepInputs

#: Columns that a part has at least.
LEAST_COLUMNS: Final = 128


def num_parts(inputs: StepInputs, num_stages: int, least: int = LEAST_COLUMNS) -> int:
    """Return in how many parts a step goes through so many stages."""
    return max(1, min(num_stages, inputs.input_ids.shape[1] // least))


def split_columns(inputs: StepInputs, count: int) -> list[tuple[StepInputs, np.ndarray]]:
    """Return a step as parts of columns, each with the logits rows of the whole that it gives.

    A part that gives none asks for its first row all the same, which a step must.

    Args:
        inputs: a step of the model's graph.
        count: how many parts; at most its columns.
    """
    width = inputs.input_ids.shape[1]
    row, column = np.divmod(inputs.logits_index, width)
    parts = []
    for number in range(count):
        start, stop = width * number // count, width * (number + 1) // count
        wanted = np.nonzero((column >= start) & (column < stop))[0]
        picked = row[wanted] * (stop - start) + column[wanted] - start
        part = replace(
            inputs,
            input_ids=inputs.input_ids[:, start:stop],
            positions=inputs.positions[:, start:stop],
            slot_mapping=inputs.slot_mapping[:, start:stop],
            logits_index=picked if len(picked) else np.zeros(1, np.int64),
            intermediate_tensors={name: value[:, start:stop] for name, value in inputs.intermediate_tensors.items()},
        )
        parts.append((part, wanted))
    return parts


def join_columns(
    results: Sequence[Mapping[str, np.ndarray]], parts: Sequence[tuple[StepInputs, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the results of a step from those of its parts.

    Args:
        results: the results of each part, by name: rows of logits, [B, Q, ...] of at least three axes, or
            [B * Q, width].
        parts: what `split_columns` made of the step.
    """
    if len(parts) == 1:
        return dict(results[0])
    rows = parts[0][0].input_ids.shape[0]
    joined: dict[str, np.ndarray] = {}
    for name, first in results[0].items():
        values = [one[name] for one in results]
        if name in ROW_RESULTS:
            count = sum(len(wanted) for _, wanted in parts)
            joined[name] = np.empty((count, *first.shape[1:]), first.dtype)
            for value, (_, wanted) in zip(values, parts, strict=True):
                joined[name][wanted] = value[: len(wanted)]
        elif first.ndim > 2:
            joined[name] = np.concatenate(values, axis=1)
        else:
            by_row = [value.reshape(rows, -1, *value.shape[1:]) for value in values]
            joined[name] = np.concatenate(by_row, axis=1).reshape(-1, *first.shape[1:])
    return joined
