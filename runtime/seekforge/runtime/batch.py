"""From scheduled rows to the arrays of one step: padding, slots and block tables in one place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seekforge.runtime.backends.base import StepInputs
from seekforge.runtime.kv_cache import SCRAP_BLOCK, blocks_needed, slots_for
from seekforge.runtime.scheduler import Row

PAD_SLOT = -1


def pack(rows: Sequence[Row], block_size: int) -> StepInputs:
    """Lay out `rows` as one rectangle [B, Q], Q the longest row.

    Padding has token 0, position 0 and slot −1. Block tables reach just to the last token of the longest
    row, since a step's work may grow with their width; shorter ones are filled up with the scrap block.
    `logits_index` names the last token of each row that samples, in row order; when none does it names token 0,
    whose result is then ignored: no output has an empty axis.
    """
    num_rows, width = len(rows), max(row.num_tokens for row in rows)
    table_width = max(blocks_needed(row.stop, block_size) for row in rows)
    input_ids = np.zeros((num_rows, width), np.int64)
    positions = np.zeros((num_rows, width), np.int64)
    slot_mapping = np.full((num_rows, width), PAD_SLOT, np.int64)
    block_table = np.full((num_rows, table_width), SCRAP_BLOCK, np.int32)
    for index, row in enumerate(rows):
        length, blocks = row.num_tokens, row.sequence.blocks
        input_ids[index, :length] = row.sequence.tokens(row.start, row.stop)
        positions[index, :length] = range(row.start, row.stop)
        slot_mapping[index, :length] = slots_for(blocks, row.start, row.stop, block_size)
        reach = blocks_needed(row.stop, block_size)
        block_table[index, :reach] = blocks[:reach]
    last = [index * width + row.num_tokens - 1 for index, row in enumerate(rows) if row.samples]
    return StepInputs(input_ids, positions, slot_mapping, block_table, np.array(last or [0], np.int64))
