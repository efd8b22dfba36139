"""Waits that end: of a stream that never does, and of a library that never answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from seekforge.common.errors import EngineError
from seekforge.runtime.backends.tensorrt import waiting
from seekforge.runtime.backends.tensorrt.waiting import SilentGpuError, await_stream, beside


class Group:
    """Ranks that add up with a device, of which only the end is told."""

    communicator = object()

    def __init__(self) -> None:
        self.is_aborted = False
        self.aborts = 0

    def agree(self, fine: bool) -> bool:
        return fine

    def abort(self) -> None:
        self.is_aborted, self.aborts = True, self.aborts + 1

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "AFTER_ABORT_S", 0.1)
    monkeypatch.setattr(waiting, "OTHERS_S", 0.3)


def test_a_stream_is_asked_until_it_is_done() -> None:
    asked: list[bool] = []
    await_stream(lambda: bool(asked.append(True)) or len(asked) > 3, None)
    assert len(asked) == 4


def test_the_rank_whose_gpu_stands_still_speaks_before_the_one_that_waits_for_it() -> None:
    """Both wait equally long. What tells them apart is whether the stream ends when its sums are ended."""
    said: list[str] = []
    groups = {"waits": Group(), "stands still": Group()}
    done: dict[str, Callable[[], bool]] = {
        "waits": lambda: groups["waits"].is_aborted,
        "stands still": lambda: False,
    }

    def wait(rank: str) -> None:
        with pytest.raises(SilentGpuError) as caught:
            await_stream(done[rank], groups[rank], 0.1)
        said.append(f"{rank}: {caught.value}")

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [
        "stands still: its GPU stands still, without an answer for 0 s; start the engine again",
        "waits: its GPU waited 0 s for a sum to which another rank did not come; start the engine again",
    ]
    assert [group.aborts for group in groups.values()] == [1, 1]


@pytest.mark.parametrize("ends", [True, False])
def test_a_stream_whose_sums_another_thread_ended_is_not_waited_for_long(ends: bool) -> None:
    """A rank is lost: the stream ends, and whoever ended its sums says why; or it does not, and is left."""
    group = Group()
    timer = threading.Timer(0.1, group.abort)
    timer.start()
    began = time.monotonic()
    if ends:
        await_stream(lambda: group.is_aborted, group, 600)
    else:
        with pytest.raises(SilentGpuError, match="stands still"):
            await_stream(lambda: False, group, 600)
    assert time.monotonic() - began < 30 and group.aborts == 1


def test_a_call_beside_gives_what_it_returns_or_raises() -> None:
    assert beside(lambda: 5, 10, "late") == 5
    with pytest.raises(ZeroDivisionError):
        beside(lambda: 1 // 0, 10, "late")


def test_a_call_that_never_answers_is_left() -> None:
    never = threading.Event()
    with pytest.raises(EngineError, match=r"^NCCL: late$"):
        beside(never.wait, 0.1, "NCCL: late")
    looks: list[int] = []

    def lost() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise EngineError("rank 1 was ended by signal 9")

    with pytest.raises(EngineError, match=r"^rank 1 was ended by signal 9$"):
        beside(never.wait, 600, "NCCL: late", lost)
    never.set()
