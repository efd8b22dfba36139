"""Steps in the shapes that plans take: padded to buckets, or halved. Pure functions over the arrays of a step."""

from __future__ import annotations

import numpy as np

from seekforge.formats.step_io import PAD_POSITION, PAD_SLOT, StepInputs


def next_power_of_two(value: int, most: int) -> int:
    """Return the least power of two that is at least `value`, but at most `most` (which is at least `value`)."""
    return min(1 << (value - 1).bit_length(), most)


def padded(inputs: StepInputs, *, max_batch_size: int, max_blocks: int) -> StepInputs:
    """Return a step of a bucket's shape: rows, table columns and logits rows that nobody reads are added.

    Padding rows are those of `step_io`: they see nothing and change no cache.
    """
    rows, width = inputs.input_ids.shape
    more = next_power_of_two(rows, max(max_batch_size, rows)) - rows
    columns = inputs.block_table.shape[1]
    wider = next_power_of_two(columns, max(max_blocks, columns)) - columns
    count = len(inputs.logits_index)
    longer = next_power_of_two(count, max(max_batch_size * width, count)) - count
    down = ((0, more), (0, 0))
    return StepInputs(
        np.pad(inputs.input_ids, down),
        np.pad(inputs.positions, down, constant_values=PAD_POSITION),
        np.pad(inputs.slot_mapping, down, constant_values=PAD_SLOT),
        np.pad(inputs.block_table, ((0, more), (0, wider))),
        np.pad(inputs.logits_index, (0, longer)),
        None if inputs.hidden_in is None else np.pad(inputs.hidden_in, (*down, (0, 0))),
        {name: np.pad(value, (*down, (0, 0))) for name, value in inputs.intermediate_tensors.items()},
    )


def halves(inputs: StepInputs) -> list[tuple[StepInputs, np.ndarray]]:
    """Return the upper and the lower rows of a step as two steps, each with the logits rows of the whole that it gives.

    A half that gives none asks for its first row all the same, which a step must.
    """
    rows, width = inputs.input_ids.shape
    middle = rows // 2
    parts = []
    for start, stop in ((0, middle), (middle, rows)):
        of_row = inputs.logits_index // width
        wanted = np.nonzero((of_row >= start) & (of_row < stop))[0]
        picked = inputs.logits_index[wanted] - start * width
        part = StepInputs(
            inputs.input_ids[start:stop],
            inputs.positions[start:stop],
            inputs.slot_mapping[start:stop],
            inputs.block_table[start:stop],
            picked if len(picked) else np.zeros(1, np.int64),
            None if inputs.hidden_in is None else inputs.hidden_in[start:stop],
            {name: value[start:stop] for name, value in inputs.intermediate_tensors.items()},
        )
        parts.append((part, wanted))
    return parts
