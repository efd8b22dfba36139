"""Arrays of a decode step that are changed in place: what is laid out anew each time is what they have to hold."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.runtime.block_table import BlockTable
from seekforge.runtime.engine.iteration import Row
from seekforge.runtime.engine.model_input import InputBuilder, ModelInput
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.sequence import Sequence

BLOCK = 4


def sequence(number: int, length: int) -> Sequence:
    one = Sequence(number, tuple(range(length)), SamplingParams(max_tokens=100), table=BlockTable(b""))
    grow(one, number)
    return one


def grow(one: Sequence, salt: int) -> None:
    """Give it a block for its last token."""
    while len(one.table.blocks) * BLOCK < one.num_tokens:
        one.table.blocks.append(1 + 7 * len(one.table.blocks) + 100 * salt)
        one.table.version += 1


def decode_row(one: Sequence) -> Row:
    return Row(one, one.num_tokens - 1, one.num_tokens, True)


def assert_same(packed: ModelInput, rows: list[Row]) -> None:
    anew = InputBuilder(BLOCK, 8).pack(rows)
    for field in ("input_ids", "positions", "slot_mapping", "block_table", "logits_index"):
        found, wanted = getattr(packed.inputs, field), getattr(anew.inputs, field)
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted), field
    assert packed.sampling == anew.sampling and np.array_equal(packed.first_logit, anew.first_logit)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(["go", "skip", "chunk", "move", "drop"]), st.integers(0, 3)), max_size=12),
)
def test_a_decode_step_is_what_laying_it_out_anew_gives(lengths: list[int], steps: list[tuple[str, int]]) -> None:
    builder = InputBuilder(BLOCK, 8)
    running = [sequence(number, length) for number, length in enumerate(lengths)]
    for what, which in steps:
        one = running[which % len(running)]
        rows = [decode_row(each) for each in running]
        if what == "skip" and len(running) > 1:  # it is not in this step
            rows.pop(which % len(running))
        elif what == "chunk":  # a piece of a prompt that gives no token
            rows = [Row(one, 0, 1, False)]
        elif what == "move":  # it lost its blocks and has others
            one.table.blocks = [block + 3 for block in one.table.blocks]
            one.table.version += 1
        elif what == "drop" and len(running) > 1:
            running.remove(one)
            rows = [decode_row(each) for each in running]
        assert_same(builder.pack(rows), rows)
        for row in rows:
            if row.samples:
                row.sequence.append(11 + row.stop)
                grow(row.sequence, row.sequence.request_id)


def test_a_decode_step_that_goes_on_has_the_arrays_of_the_one_before() -> None:
    builder, one = InputBuilder(BLOCK, 8), sequence(1, 5)
    arrays = []
    for _ in range(4):
        rows = [decode_row(one)]
        packed = builder.pack(rows)
        assert_same(packed, rows)
        arrays.append([getattr(packed.inputs, field.name) for field in dataclasses.fields(packed.inputs)])
        one.append(50)
        grow(one, 1)
    known = [all(a is b for a, b in zip(before, after)) for before, after in itertools.pairwise(arrays)]
    assert known == [True, True, True]  # positions 4 to 7 are one block
    rows = [decode_row(one)]
    packed = builder.pack(rows)  # the next block
    assert packed.inputs.positions is not arrays[0][1]
    assert_same(packed, rows)
