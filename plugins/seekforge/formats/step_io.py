"""What a step of a graph takes and gives: names, arrays and their layout, for the runtime, parity, checks and tests.

A step is a rectangle of B sequences by Q new tokens. Shorter rows are padded on the right: with token 0, position −1
and slot −1, so that a padded place sees nothing and writes to the scrap block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from seekforge.formats.paged_cache import BLOCK_SIZE

#: Graph names of an engine: the model, and its multi-token prediction module.
MODEL: Final = "model"
MTP: Final = "mtp"
#: Results with one row per entry of `logits_index`.
ROW_RESULTS: Final = ("top_logits", "top_ids", "logsumexp", "logits")
#: What the last layers of a model give: `hidden` [B, Q, H] has one row per token.
RESULTS: Final = ("hidden", *ROW_RESULTS)
#: The results that a dump keeps: the others follow from the logits.
DUMPED_RESULTS: Final = ("hidden", "logits")
#: What one layer hands to the next, and a stage of a model to the next: [B, Q, H] each.
INTERMEDIATE_TENSORS: Final = ("hidden_states", "residual")
#: What a layer that chooses keys hands to those that attend to the same: [B, Q, index_topk] int32. A graph that begins
#: or ends between them has it as an input or an output.
TOPK_INDICES: Final = "topk_indices"
TOPK_INDICES_IN, TOPK_INDICES_OUT = f"{TOPK_INDICES}_in", f"{TOPK_INDICES}_out"
#: Position and slot of a padded place.
PAD_POSITION, PAD_SLOT = -1, -1


@dataclass(frozen=True)
class StepInputs:
    """The inputs of one [B, Q] step beside caches and weights.

    Attributes:
        input_ids: [B, Q], int64; 0 pads.
        positions: [B, Q], int64; −1 pads.
        slot_mapping: [B, Q], int64. slot = block_id * BLOCK_SIZE + offset; −1 pads.
        block_table: [B, MB], int32; 0, the scrap block, fills rows up.
        logits_index: [N], int64, N ≥ 1: rows of the flattened B·Q whose logits are wanted.
        hidden_in: [B, Q, H], float32, for the MTP graph; None for the model.
        intermediate_tensors: what a part of a model takes from the layer before it, by name: [B, Q, H], float32,
            and perhaps which keys were chosen.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    block_table: np.ndarray
    logits_index: np.ndarray
    hidden_in: np.ndarray | None = None
    intermediate_tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def array(self, name: str) -> np.ndarray:
        """Return the input called `name`."""
        return self.intermediate_tensors[name] if name in self.intermediate_tensors else getattr(self, name)

    @property
    def real(self) -> np.ndarray:
        """[B·Q] bool: rows that are not padding."""
        return self.positions.reshape(-1) >= 0


def lay_out(
    tokens: Sequence[Sequence[int]],
    starts: Sequence[int],
    tables: Sequence[Sequence[int]],
    logits_index: Sequence[int] | None = None,
) -> StepInputs:
    """Lay out a rectangular step.

    Args:
        tokens: new tokens of each sequence (at least one sequence with one token).
        starts: position of each sequence's first new token.
        tables: blocks of each sequence, enough for its last token.
        logits_index: rows of the flattened rectangle whose logits are wanted; None takes every row that is not padding.
    """
    rows, width = len(tokens), max(len(row) for row in tokens)
    ids = np.zeros((rows, width), np.int64)
    positions = np.full((rows, width), PAD_POSITION, np.int64)
    slots = np.full((rows, width), PAD_SLOT, np.int64)
    table = np.zeros((rows, max(len(blocks) for blocks in tables)), np.int32)
    for row, (new, start, blocks) in enumerate(zip(tokens, starts, tables, strict=True)):
        n = len(new)
        where = np.arange(start, start + n)
        ids[row, :n] = new
        positions[row, :n] = where
        table[row, : len(blocks)] = blocks
        slots[row, :n] = table[row, where // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + where % BLOCK_SIZE
    wanted = np.flatnonzero(positions.reshape(-1) >= 0) if logits_index is None else np.array(logits_index, np.int64)
    return StepInputs(ids, positions, slots, table, wanted)
