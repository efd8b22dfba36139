"""Ranks that differ in what must be the same are named, on every rank and at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from seekforge.common.errors import EngineError
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks.same_check import SameCheck, is_asked_for
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory

LAYOUT = Parallelism(tp=3, pp=2)


def told(values: list[np.ndarray]) -> list[str]:
    """Return what each rank of the second stage says of its value, nothing where all is well."""
    memory = Memory(LAYOUT)
    said = [""] * 3

    def work(place: int) -> None:
        check = SameCheck(SharedMemory(memory, 3 + place, lambda: None), LAYOUT, 3 + place)
        try:
            check.require("logits", np.ones(4))
            check.require("expert_ids.3", values[place])
        except EngineError as error:
            said[place] = str(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_equal_values_pass() -> None:
    assert told([np.arange(6)] * 3) == ["", "", ""]


@pytest.mark.parametrize(
    ("odd", "other"),
    [(0, np.arange(6) + 1), (1, np.arange(6).reshape(2, 3)), (2, np.arange(6, dtype=np.int32)), (2, -np.arange(6))],
)
def test_the_rank_that_differs_is_named_by_all(odd: int, other: np.ndarray) -> None:
    """By its bits, its shape or its type."""
    values = [np.arange(6)] * 3
    values[odd] = other
    (line,) = set(told(values))
    usual = 4 if odd == 0 else 3
    assert line.startswith(f"rank {3 + odd} has another expert_ids.3 than rank {usual} (check 2 of stage 1)")


def test_the_variable_turns_it_on() -> None:
    assert is_asked_for({"SEEKFORGE_CHECK_RANKS": "1"})
    assert not any(is_asked_for(one) for one in ({}, {"SEEKFORGE_CHECK_RANKS": ""}, {"SEEKFORGE_CHECK_RANKS": "0"}))
