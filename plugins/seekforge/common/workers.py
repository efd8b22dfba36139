"""Processes that each do a part of this one's work, and end with it, however that ends."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from types import TracebackType
from typing import Final, ParamSpec, Self, TypeVar

from seekforge.common.errors import EnvironmentFault
from seekforge.common.system import end_with
from seekforge.common.temporary import temporary_folder

#: How often it is looked for processes that were begun while all were ended.
_LOOK_AGAIN_S: Final = 0.05

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Workers:
    """Processes for a block, each begun anew for one part of the work.

    Whatever ends the block early ends them and what waits for them. Ctrl-C, which a terminal sends to all, is for this
    process alone. Their temporary files go where the block removes them.

    Args:
        number: how many there are at a time.
        doing: what each does, for the message: "a process that <doing> was ended".

    Raises:
        EnvironmentFault: at the end of the block: one of them was ended from outside.
    """

    def __init__(self, number: int, doing: str) -> None:
        self._number, self._doing = number, doing
        self._block = ExitStack()

    def __enter__(self) -> Self:
        self._others = set(multiprocessing.active_children())
        with ExitStack() as block:
            scratch = block.enter_context(temporary_folder("seekforge-workers"))
            self._pool = block.enter_context(
                concurrent.futures.ProcessPoolExecutor(
                    self._number,
                    mp_context=multiprocessing.get_context("spawn"),
                    max_tasks_per_child=1,
                    initializer=_begin,
                    initargs=(os.getpid(), str(scratch)),
                )
            )
            self._block = block.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._end_all()
        self._block.close()
        if isinstance(error, BrokenProcessPool):
            raise EnvironmentFault(
                f"a process that {self._doing} was ended from outside, as when memory is short; run it again, with "
                "fewer at a time"
            ) from None

    def _end_all(self) -> None:
        """End all, also those that begin meanwhile: one that was killed may hold the lock that they wait for."""
        ending = threading.Thread(target=self._pool.shutdown, kwargs={"wait": True, "cancel_futures": True})
        ending.start()
        while ending.is_alive():
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
            ending.join(_LOOK_AGAIN_S)

    def submit(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> Future[_R]:
        """Have a function of a module called in one of them, when its turn comes."""
        # what begins now inherits that the signal is held back: the process, and the thread that begins later ones
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(function, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(parent: int, scratch: str) -> None:
    end_with(parent)
    tempfile.tempdir = scratch
