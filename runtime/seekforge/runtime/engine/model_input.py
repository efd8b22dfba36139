"""From scheduled rows to the arrays of one step: padding, slots and block tables in one place."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np

from seekforge.formats.paged_cache import SCRAP_BLOCK, blocks_needed
from seekforge.formats.step_io import PAD_POSITION, PAD_SLOT, StepInputs
from seekforge.runtime.engine.iteration import Row
from seekforge.runtime.row_index import RowIndex
from seekforge.runtime.sequence import Sequence


@dataclass(frozen=True)
class ModelInput:
    """One rectangle, and where its logits are. The arrays hold until the next one is laid out.

    Attributes:
        inputs: the inputs of the step.
        sampling: indices of the rows that sample.
        first_logit: [len(sampling)]: where the logits after each one's last known token are; those after its drafts
            follow.
        prompt_spans: row index -> logits of the prompt's positions in this row, one for each token that follows one.
    """

    inputs: StepInputs
    sampling: list[int]
    first_logit: np.ndarray
    prompt_spans: dict[int, range]


class InputBuilder:
    """Lays out groups of rows. Keeps the block tables of running sequences as one array, and copies what changed.

    Where the sequences of the last decode step go on by a token, its arrays are theirs: tokens, positions and slots
    are changed in place, and whoever holds them knows them again.
    """

    def __init__(self, block_size: int, max_batch_size: int) -> None:
        self.block_size = block_size
        self._tables = np.full((max_batch_size, 16), SCRAP_BLOCK, np.int32)
        self._versions = [-1] * max_batch_size
        self._places = RowIndex(max_batch_size)
        self._decode: tuple[Rows[Row], list[int], ModelInput] | None = None  # rows, versions of their tables, arrays

    def pack(self, rows: Rows[Row]) -> ModelInput:
        """Lay out `rows` as one rectangle [B, Q], Q the longest row.

        Padding is that of `step_io`. Block tables reach just to the last token of the longest
        row, since a step's work may grow with their width; shorter ones are filled up with the scrap block.
        When no row wants logits, `logits_index` names token 0, whose result is then ignored: no output has an
        empty axis.
        """
        if self._decode is not None and self._goes_on(rows, *self._decode[:2]):
            packed = self._decode[2]
            self._decode = rows, self._decode[1], packed
            return _moved_on(packed, rows)
        width = max([row.stop - row.start for row in rows])
        places = self._update([row.sequence for row in rows])
        if width == 1:
            input_ids, positions, real = _column(rows)
        else:
            input_ids, positions, real = _rectangle(rows, width)
        reach = blocks_needed(max([row.stop for row in rows]), self.block_size)
        block_table = self._tables[places, :reach]
        block = positions // self.block_size
        slots = self._tables[places[:, None], block].astype(np.int64) * self.block_size + positions % self.block_size
        if real is not None:
            slots = np.where(real, slots, PAD_SLOT)
            positions = np.where(real, positions, PAD_POSITION)
        if width == 1 and all(row.samples for row in rows):  # decode without drafts: nothing to work out
            every = np.arange(len(rows))
            packed = ModelInput(StepInputs(input_ids, positions, slots, block_table, every), every.tolist(), every, {})
            self._decode = rows, [row.sequence.table.version for row in rows], packed
            return packed
        wanted: list[int] = []
        sampling: list[int] = []
        first: list[int] = []
        prompt_spans: dict[int, range] = {}
        for index, row in enumerate(rows):
            end = index * width + row.num_tokens
            if row.samples:
                sampling.append(index)
                first.append(len(wanted))
                wanted.extend(range(end - 1 - row.num_drafts, end))
            if row.sequence.params.prompt_logprobs is not None:
                count = min(row.stop, len(row.sequence.prompt_ids) - 1) - row.start
                if count > 0:
                    prompt_spans[index] = range(len(wanted), len(wanted) + count)
                    wanted.extend(range(index * width, index * width + count))
        inputs = StepInputs(input_ids, positions, slots, block_table, np.array(wanted or [0], np.int64))
        return ModelInput(inputs, sampling, np.array(first, np.int64), prompt_spans)

    def _goes_on(self, rows: Rows[Row], before: Rows[Row], versions: list[int]) -> bool:
        """Whether each row is the token behind that of `before`, in the same block."""
        if len(rows) != len(before):
            return False
        for row, last, version in zip(rows, before, versions):
            sequence, start = row.sequence, row.start
            if sequence is not last.sequence or start != last.start + 1 or row.stop != start + 1 or not row.samples:
                return False
            if start % self.block_size == 0 or sequence.table.version != version:
                return False
        return True

    def _update(self, sequences: list[Sequence]) -> np.ndarray:
        """Return where each sequence's block table stands, up to date."""
        places: list[int] = []
        for sequence in sequences:
            place = self._places.find(sequence)
            if place is None:
                place, _ = self._places.settle(sequence)
                self._versions[place] = -1
            if self._versions[place] != sequence.table.version:
                blocks = sequence.table.blocks
                if len(blocks) > self._tables.shape[1]:
                    wide = np.full((len(self._versions), 2 * len(blocks)), SCRAP_BLOCK, np.int32)
                    wide[:, : self._tables.shape[1]] = self._tables
                    self._tables = wide
                self._tables[place, : len(blocks)] = blocks
                self._tables[place, len(blocks) :] = SCRAP_BLOCK
                self._versions[place] = sequence.table.version
            places.append(place)
        return np.array(places)


def _moved_on(packed: ModelInput, rows: Rows[Row]) -> ModelInput:
    """Write the next token of each row of a decode step into its arrays."""
    input_ids, positions, slots = packed.inputs.input_ids, packed.inputs.positions, packed.inputs.slot_mapping
    for index, row in enumerate(rows):  # by items: the first addition of arrays behind a step takes 20 µs
        input_ids[index, 0] = row.sequence.last_id
        positions[index, 0] = row.start
        slots[index, 0] += 1
    return packed


def _column(rows: Rows[Row]) -> tuple[np.ndarray, np.ndarray, None]:
    ids = [row.sequence.last_id if row.samples else row.sequence.tokens(row.start, row.stop)[0] for row in rows]
    return np.array(ids, np.int64)[:, None], np.array([row.start for row in rows], np.int64)[:, None], None


def _rectangle(rows: Rows[Row], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return token ids, positions, and which of them are no padding, each [B, width]."""
    input_ids = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        known = row.num_tokens - row.num_drafts
        input_ids[index, :known] = row.sequence.tokens(row.start, row.stop - row.num_drafts)
        if row.num_drafts:
            input_ids[index, known : row.num_tokens] = row.sequence.drafts[: row.num_drafts]
    starts = np.array([row.start for row in rows], np.int64)[:, None]
    lengths = np.array([row.stop - row.start for row in rows], np.int64)[:, None]
    columns = np.arange(width)
    real = columns < lengths
    return input_ids, np.where(real, starts + columns, 0), real
