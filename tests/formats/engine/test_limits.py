"""One rule says which limits an engine can have."""

from __future__ import annotations

import pytest

from seekforge.formats.engine.limits import MOST, range_fault, step_fault
from seekforge.formats.engine.manifest import Limits

POSSIBLE = Limits(max_model_len=4096, max_batch_size=8, max_num_batched_tokens=64)


def changed(**limits: int) -> Limits:
    return POSSIBLE.model_copy(update=limits)


@pytest.mark.parametrize(
    ("limits", "longest", "fault"),
    [
        (POSSIBLE, 4096, None),
        (POSSIBLE, None, None),
        (changed(max_model_len=MOST), None, None),
        (changed(max_model_len=4097), 4096, "(max_model_len) is 4097, expected 1 to 4096 (max_position_embeddings"),
        (changed(max_model_len=0), 4096, "(max_model_len) is 0, expected 1 to 4096"),
        (changed(max_batch_size=0), 4096, "(max_batch_size) is 0, expected 1 to 2147483647"),
        (changed(max_num_batched_tokens=MOST + 1), None, "(max_num_batched_tokens) is 2147483648, expected 1 to"),
    ],
)
def test_each_limit_is_a_size_that_there_can_be(limits: Limits, longest: int | None, fault: str | None) -> None:
    said = range_fault(limits, longest, "({})".format)
    assert said is None if fault is None else said is not None and said.startswith(fault)


def test_a_step_holds_a_token_of_each_of_its_sequences() -> None:
    assert step_fault(changed(max_num_batched_tokens=8), str) is None
    assert step_fault(changed(max_num_batched_tokens=7), str) == (
        "max_num_batched_tokens is 7, expected at least max_batch_size 8: a decode step has one token of each sequence"
    )
