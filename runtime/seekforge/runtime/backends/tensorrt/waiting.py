"""Waits for a GPU, or a library, that may never answer. All of it is plain Python; tests drive it with pretended ones.

A stream is asked whether it is done instead of being waited for, as a wait inside of CUDA cannot be left. One that
waits for another rank's part of a sum ends when the communicator is aborted, and one whose own GPU stands still does
not: so the rank to blame is told from those that wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from seekforge.common.errors import EngineError
from seekforge.runtime.backends.tensorrt.device import Group

T = TypeVar("T")

#: Seconds that a GPU may work on what it was given, by far more than a step takes.
PATIENCE_S: Final = 20.0
#: Seconds in which a stream ends that waited for others, once their communicator is aborted, and seconds more after
#: which the rank that only waited speaks: the one whose GPU stands still has said so by then.
AFTER_ABORT_S, OTHERS_S = 3.0, 3.0
#: A step of few tokens is looked for all the time, what lasts longer twice in a millisecond.
_EAGER_S, _NAP_S = 0.05, 5e-4
_LOOK_S: Final = 0.05


class SilentGpuError(EngineError):
    """A GPU did not do in time what it was given. What it was told to use must not be given back."""


def await_stream(is_done: Callable[[], bool], group: Group | None, patience_s: float | None = None) -> None:
    """Return when a stream has done everything.

    Args:
        is_done: asks the stream; raises what the GPU failed with.
        group: the ranks that add up with it; None: it is alone.
        patience_s: seconds that it may take; None takes `PATIENCE_S`.

    Raises:
        SilentGpuError: it took longer, or did not end though the communicator was aborted.
    """
    seconds = PATIENCE_S if patience_s is None else patience_s
    if _ends(is_done, seconds, group):
        return
    if group is not None and not group.is_aborted:
        group.abort()
        if _ends(is_done, AFTER_ABORT_S, None):
            time.sleep(OTHERS_S)
            raise SilentGpuError(
                f"its GPU waited {seconds:.0f} s for a sum to which another rank did not come; start the engine again"
            )
    raise SilentGpuError(f"its GPU stands still, without an answer for {seconds:.0f} s; start the engine again")


def _ends(is_done: Callable[[], bool], seconds: float, group: Group | None) -> bool:
    """Return whether a stream ends in time; less time is left once its communicator is aborted."""
    began = time.monotonic()
    end = began + seconds
    was_aborted = False
    while not is_done():
        now = time.monotonic()
        if not was_aborted and group is not None and group.is_aborted:
            was_aborted, end = True, min(end, now + AFTER_ABORT_S)
        if now > end:
            return False
        time.sleep(0 if now - began < _EAGER_S else _NAP_S)
    return True


def beside(work: Callable[[], T], seconds: float, fault: str, lost: Callable[[], None] = lambda: None) -> T:
    """Return what a library's call returns, which is made in a thread of its own and left there if it does not end.

    Args:
        work: makes the call.
        seconds: how long it may take.
        fault: what is said when it takes longer.
        lost: raises when nobody will answer any more.

    Raises:
        EngineError: `fault`, or what `lost` raises.
    """
    made: list[T] = []
    raised: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:
            raised.append(error)
        ended.set()

    threading.Thread(target=run, name="seekforge-call", daemon=True).start()
    deadline = time.monotonic() + seconds
    while not ended.wait(_LOOK_S):
        lost()
        if time.monotonic() > deadline:
            raise EngineError(fault)
    if raised:
        raise raised[0]
    return made[0]
