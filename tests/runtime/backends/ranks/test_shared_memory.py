"""Ranks as threads of one process: what passes through the memory does not know the difference."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from seekforge.common.errors import EngineError
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks import shared_memory
from seekforge.runtime.backends.ranks.message import Message
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory


def together(parallelism: Parallelism, work: Callable[[int, SharedMemory], Any]) -> list[Any]:
    """Return what each rank makes of `work(rank, collectives)`."""
    memory = Memory(parallelism)
    ranks = [SharedMemory(memory, rank, lambda: None) for rank in range(parallelism.num_ranks)]
    with ThreadPoolExecutor(len(ranks)) as pool:
        results = list(pool.map(work, range(len(ranks)), ranks))
    memory.close()
    return results


def test_sums_are_those_of_the_fixed_order_of_ranks_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    parts = (rng.standard_normal((3, 40, 7, 512)) * 10.0 ** rng.integers(-6, 6, (3, 40, 7, 512))).astype(np.float32)
    results = together(Parallelism(tp=3), lambda rank, shared: [shared.sum(part) for part in parts[rank]])
    expected = (parts[0] + parts[1]) + parts[2]
    assert not np.array_equal(expected, parts[0] + (parts[1] + parts[2])), "the order is seen in these numbers"
    for result in results:
        np.testing.assert_array_equal(np.stack(result), expected)


def test_a_sum_may_be_longer_than_the_memory() -> None:
    part = np.arange(700_000, dtype=np.float32)
    for result in together(Parallelism(tp=2), lambda rank, shared: shared.sum(part.reshape(2, -1))):
        np.testing.assert_array_equal(result.reshape(-1), 2 * part)


def test_stages_add_up_among_themselves() -> None:
    results = together(Parallelism(tp=2, pp=2), lambda rank, shared: shared.sum(np.array([10.0**rank], np.float32)))
    assert [float(result[0]) for result in results] == [11, 11, 1100, 1100]


def test_ranks_that_are_in_different_steps_are_named() -> None:
    def work(rank: int, shared: SharedMemory) -> str:
        with pytest.raises(EngineError) as raised:
            shared.sum(np.zeros(3 + rank, np.float32))
        return str(raised.value)

    said = together(Parallelism(tp=2), work)
    assert "rank 1 adds 16 bytes where rank 0 adds 12: they are not in the same step" in said[0]


def test_ranks_that_add_as_much_in_another_step_are_named() -> None:
    """A step that one of them did not take: sizes would not tell."""

    def work(rank: int, shared: SharedMemory) -> str:
        if rank == 0:
            shared.broadcast(Message({"step": 1}))
        with pytest.raises(EngineError) as raised:
            shared.sum(np.zeros(3, np.float32))
        return str(raised.value)

    said = together(Parallelism(tp=2), work)
    assert "rank 1 adds after 0 pieces of broadcasts, rank 0 after 1: they are not in the same step" in said[0]


def test_every_rank_gets_what_rank_0_broadcasts_however_long() -> None:
    sent = [np.arange(count, dtype=np.int64) for count in (0, 5, 400_000, 1, 70_000)]

    def work(rank: int, shared: SharedMemory) -> list[np.ndarray]:
        messages = [Message({"number": number}, {"x": x}) for number, x in enumerate(sent)]
        received = [shared.broadcast(None if rank else message) for message in messages]
        assert [message.values["number"] for message in received] == list(range(len(sent)))
        return [message.arrays["x"] for message in received]

    for result in together(Parallelism(tp=2, pp=2), work):
        for one, expected in zip(result, sent, strict=True):
            np.testing.assert_array_equal(one, expected)


def test_stages_send_to_the_next_and_to_rank_0() -> None:
    def work(rank: int, shared: SharedMemory) -> list[float]:
        result: list[float] = []
        if rank < 2:
            shared.send(Message({"x": rank + 0.5}), source=rank, target=rank + 2)
        else:
            result.append(float(shared.send(None, source=rank - 2, target=rank).values["x"]))
        if rank in (0, 2):
            message = Message({"x": 7}) if rank else None
            result.append(shared.send(message, source=2, target=0).values["x"])
        return result

    assert together(Parallelism(tp=2, pp=2), work) == [[7], [], [0.5, 7], [1.5]]


def test_who_waits_asks_whether_the_others_live() -> None:
    def alarm() -> None:
        raise EngineError("rank 1 is gone")

    memory = Memory(Parallelism(tp=2))
    with pytest.raises(EngineError, match="rank 1 is gone"):
        SharedMemory(memory, 0, alarm).sum(np.zeros(1, np.float32))
    memory.close()


@pytest.mark.parametrize(("cores", "most_looks"), [(1, 100), (2, 100_000)])
def test_who_waits_leaves_the_core_where_there_are_fewer_cores_than_ranks(
    cores: int, most_looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that is waited for needs it; with a core for each, looking again is faster than waking up."""
    looks, naps = 0, []
    monkeypatch.setattr(shared_memory, "usable_cores", lambda: cores)
    monkeypatch.setattr(shared_memory.time, "sleep", lambda seconds: naps.append(looks))
    memory = Memory(Parallelism(tp=2))

    def slept() -> bool:
        nonlocal looks
        looks += 1
        return bool(naps)

    SharedMemory(memory, 0, lambda: None).wait(slept)
    memory.close()
    assert most_looks / 100 < naps[0] <= most_looks, naps
