"""Many threads, one engine: who runs the next step, and how requests come in and go out meanwhile.

One of the threads that wait for tokens runs the next step, for the requests of all. While a step runs nobody else
touches the scheduler: what is asked of it then lies in an inbox until the step ends.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from seekforge.common.errors import EngineError
from seekforge.runtime.engine.core import Core
from seekforge.runtime.engine.request import RequestState
from seekforge.runtime.sequence import FinishReason, Sequence


class StepLoop:
    """Runs the steps of a core, for requests that any thread may enter.

    Attributes:
        live: request id of a sequence -> its request.
        closed: nothing enters any more.
        paused: no step begins; requests enter and wait.
        after_deltas: called, with the turn held, when a step or a change has handed on all its deltas, so that a
            listener can pass them on together.
    """

    def __init__(self, core: Core) -> None:
        self.live: dict[int, RequestState] = {}
        self.closed = False
        self.paused = False
        self.after_deltas: Callable[[], None] | None = None
        self._pid = os.getpid()
        self._core, self._scheduler = core, core.scheduler
        # Guards what follows, and the scheduler while no step is run.
        self._turn = threading.Condition()
        self._stepping = False
        self._inbox: deque[tuple[RequestState, Callable[[RequestState], None]]] = deque()
        self._num_entering = 0

    def enter(self, count: int, make: Callable[[], list[RequestState]]) -> list[RequestState]:
        """Put requests into the queue, all or none.

        Args:
            count: their sequences.
            make: makes the requests, once it is known that they fit.

        Raises:
            QueueFullError: they do not.
            EngineError: closed.
        """
        if os.getpid() != self._pid:  # before the lock, which another thread may have held at the fork
            raise EngineError(
                "this LLM was opened before the process was forked, and cannot run here; open another one"
            )
        with self._turn:
            if self.closed:
                raise EngineError("this LLM is closed; open another one")
            self._scheduler.check_queue(count + self._num_entering)
            lives = make()
            self._num_entering += count
            self._post(lives, self._enter)
        return lives

    def drop(self, lives: list[RequestState]) -> None:
        """End requests; those that are done are merely forgotten."""
        with self._turn:
            self._post(lives, self._end)

    def advance(self, done: Callable[[], bool]) -> None:
        """Run steps, or wait while another thread runs them, until `done`."""
        with self._turn:
            while not done():
                if self.closed:
                    raise EngineError("this LLM was closed while requests were on their way")
                if self._stepping or self.paused:
                    self._turn.wait()
                else:
                    self._step()

    def pause(self, paused: bool) -> None:
        """Let no step begin, or let them go on; a step that runs ends first."""
        with self.between_steps():
            self.paused = paused

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Run steps while there is work, and wait for it, until `stopped` or closed: for a thread of its own."""
        with self._turn:
            while not stopped() and not self.closed:
                if self._stepping or self.paused or not (self._inbox or self._scheduler.has_work):
                    self._turn.wait()
                    continue
                try:
                    self._step()
                except Exception as error:  # a bug of ours: whoever waits must learn of it
                    self.end_all("error", f"{type(error).__name__}: {error}")

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """A context in which no step runs and none begins."""
        with self._turn:
            while self._stepping:
                self._turn.wait()
            self._empty_inbox()
            try:
                yield
            finally:
                self._handed_on()

    def end_all(self, reason: FinishReason, error: str | None) -> None:
        """End every request, between steps."""
        for live in set(self.live.values()):
            for sequence in live.sequences:
                self._scheduler.abort(sequence, reason, error)
                self._deliver(live, sequence)
        self.live.clear()
        self._handed_on()

    def end_stale(self, oldest: int) -> None:
        """End the completions whose first token was chosen by weights before version `oldest`, between steps."""
        for live in set(self.live.values()):
            for sequence in live.sequences:
                if sequence.weight_version < oldest and sequence.state != "finished":
                    self._scheduler.abort(sequence)
                    self._deliver(live, sequence)

    def _post(self, lives: list[RequestState], change: Callable[[RequestState], None]) -> None:
        self._inbox.extend((live, change) for live in lives)
        if not self._stepping:
            self._empty_inbox()
        self._handed_on()

    def _handed_on(self) -> None:
        """Wake whoever waits for deltas."""
        if self.after_deltas is not None:
            self.after_deltas()
        self._turn.notify_all()

    def _empty_inbox(self) -> None:
        """Make the changes that were asked for. One that fails ends its own request and no other."""
        while self._inbox:
            live, change = self._inbox.popleft()
            try:
                change(live)
            except Exception as error:
                self._fail(live, f"{type(error).__name__}: {error}")

    def _deliver(self, live: RequestState, sequence: Sequence) -> None:
        """Hand on what a sequence gained; a text or a listener that fails ends its own request and no other."""
        try:
            live.deliver(sequence)
        except Exception as error:
            self._fail(live, f"{type(error).__name__}: {error}")

    def _fail(self, live: RequestState, why: str) -> None:
        """End one request whatever state it is in, and wake whoever waits for it."""
        for sequence in live.sequences:
            self.live.pop(sequence.request_id, None)
            with contextlib.suppress(Exception):  # the scheduler may not know it, or not all of it
                self._scheduler.abort(sequence, "error", why)
            if sequence.finish_reason is None:
                sequence.finish_reason, sequence.error, sequence.state = "error", why, "finished"
            live.fail(sequence)
        self._turn.notify_all()

    def _enter(self, live: RequestState) -> None:
        self._num_entering -= len(live.sequences)
        for sequence in live.sequences:
            self.live[sequence.request_id] = live
        self._scheduler.add(live.sequences[0])

    def _end(self, live: RequestState) -> None:
        for sequence in live.sequences:
            self._scheduler.abort(sequence)
            self.live.pop(sequence.request_id, None)

    def _step(self) -> None:
        """Run one iteration, with the turn held at begin and end, and hand what is new to its requests."""
        self._empty_inbox()
        if not self._scheduler.has_work:
            self._handed_on()
            return
        self._stepping = True
        touched: list[Sequence] = []
        self._turn.release()
        try:
            touched = self._core.step()
        except BaseException:
            touched = [s for live in set(self.live.values()) for s in live.sequences if s.state == "finished"]
            raise
        finally:
            self._turn.acquire()
            self._stepping = False
            for sequence in touched:
                live = self.live.get(sequence.request_id)
                if live is not None:
                    self._deliver(live, sequence)
            self._empty_inbox()
            self._handed_on()
