"""The server's end of the channel: requests as streams that a coroutine reads.

`EngineClient` is what the interfaces need of an engine, `EngineProcess` the one that runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from seekforge.common import errors
from seekforge.common.errors import EngineError, RequestError, SeekforgeError
from seekforge.common.system import child_environment
from seekforge.runtime.engine.block_changes import BlockChange
from seekforge.runtime.engine.outputs import GenerationError
from seekforge.runtime.engine.scheduler import QueueFullError
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.server.channel import Piece, joined, packed, receive

#: Seconds that an engine has to end when it is asked to, before it is killed.
_CLOSE_S = 10.0


class EngineDeadError(EngineError):
    """The process that runs the engine has ended."""


class Stream:
    """One request on its way: read it until a piece has `end`, and close it in any case."""

    __slots__ = ("_client", "_error", "_pieces", "_waiter", "ended", "num_prompt_tokens", "request_id")

    def __init__(self, request_id: int, client: StreamOwner) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = -1
        self.ended = False
        self._client = client
        self._pieces: list[Piece] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: SeekforgeError | None = None

    async def accepted(self) -> int:
        """Wait until the engine has taken the request; return the number of tokens of its prompt.

        Raises:
            RequestError: it cannot be served.
            EngineError: the engine failed.
        """
        while self.num_prompt_tokens < 0:  # a first piece may come before
            await self._woken()
        return self.num_prompt_tokens

    async def read(self) -> list[Piece]:
        """Return all that has come since the last call, one piece for each completion; wait for some if need be.

        A reader that lags behind gets longer pieces, not more of them.

        Raises:
            GenerationError: the engine failed on this request.
            EngineDeadError: it is gone.
        """
        while not self._pieces:
            await self._woken()
        pieces, self._pieces = joined(self._pieces), []
        last = pieces[-1].end
        if last is not None and last.error is not None:
            raise GenerationError(last.error, [])
        return pieces

    def close(self) -> None:
        """End the request if it has not ended."""
        self._client.forget(self)

    async def _woken(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self, piece: Piece) -> None:
        """Take what came for it."""
        self._pieces.append(piece)
        self.ended = self.ended or piece.end is not None
        self.wake()

    def fail(self, error: SeekforgeError) -> None:
        """End it with an error, raised after what came before is read."""
        self._error, self.ended = error, True
        self.wake()

    def wake(self) -> None:
        """Let the coroutine that waits go on."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class StreamOwner(Protocol):
    """Whoever made a stream."""

    def forget(self, stream: Stream) -> None:
        """End the request if it runs, and give it no more pieces."""
        ...


class EngineClient(StreamOwner, Protocol):
    """What the interfaces need of an engine.

    Attributes:
        facts: `engine_process.facts`.
        dead: why the engine is gone; nothing while it is there.
    """

    facts: Mapping[str, Any]
    dead: str

    def start(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        in_reasoning: bool = False,
    ) -> Stream:
        """Start a request. Whether it can be served is known when `Stream.accepted` returns.

        Args:
            prompt: text or token ids.
            params: the sampling parameters.
            priority: lower goes first.
            timeout_s: after so many seconds the answer ends with what it has.
            in_reasoning: whether the prompt ends inside a thought, behind which a form begins.
        """
        ...

    async def call(self, name: str, **arguments: Any) -> Any:
        """Call one of `engine_process.CALLS`.

        Raises:
            SeekforgeError: it cannot be done.
        """
        ...


class EngineProcess:
    """An engine in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        """Use `EngineProcess.open`."""
        self.facts: Mapping[str, Any] = {}
        self.dead = ""
        self.on_dead: Callable[[], None] = lambda: None
        self._on_blocks: Callable[[Sequence[BlockChange]], None] = lambda changes: None
        self._process, self._reader, self._writer = process, reader, writer
        self._numbers = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._closing = False

    @staticmethod
    async def open(
        engine: Path,
        options: Mapping[str, Any],
        on_loading: Callable[[str], None],
        *,
        command: Sequence[str] = (sys.executable, "-m", "seekforge.runtime.server.engine_process"),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> EngineProcess:
        """Start the process and load the engine.

        Args:
            engine: the folder of the engine.
            options: keyword arguments of `LLM`.
            on_loading: called with what is done.
            command: what is started, before the number of its descriptor.
            environment: variables that the process has beside those of this one.

        Raises:
            EngineError: the engine cannot be loaded.
        """
        ours, its = socket.socketpair()
        with its:
            process = subprocess.Popen(
                [*command, str(its.fileno())],
                pass_fds=(its.fileno(),),
                env={**child_environment(), **environment},
                stdin=subprocess.DEVNULL,
            )
        client = EngineProcess(process, *await asyncio.open_connection(sock=ours))
        try:
            client._writer.write(packed("open", engine, dict(options)))
            while True:
                frame = await receive(client._reader)
                match frame:
                    case ("loading", what):
                        on_loading(what)
                    case ("ready", facts):
                        client.facts = facts
                        break
                    case ("failed", message):
                        raise EngineError(message)
                    case _:
                        raise EngineError(f"{engine}: the process that runs it ended {await client._how_it_ended()}")
        except BaseException:
            await client.close()
            raise
        client._reading = asyncio.create_task(client._read())
        return client

    @property
    def process_id(self) -> int:
        """The process that runs the engine."""
        return self._process.pid

    @property
    def num_streams(self) -> int:
        """Requests that are on their way."""
        return len(self._streams)

    def start(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        in_reasoning: bool = False,
    ) -> Stream:
        """As `EngineClient.start`."""
        stream = Stream(next(self._numbers), self)
        if self.dead:
            stream.fail(EngineDeadError(self.dead))
            return stream
        self._streams[stream.request_id] = stream
        self._writer.write(packed("add", stream.request_id, prompt, params, priority, timeout_s, in_reasoning))
        return stream

    def forget(self, stream: Stream) -> None:
        """End a request if it runs, and give it no more pieces."""
        known = self._streams.pop(stream.request_id, None)
        if known is not None and not stream.ended and not self.dead:
            self._writer.write(packed("abort", (stream.request_id,)))

    async def call(self, name: str, **arguments: Any) -> Any:
        """As `EngineClient.call`."""
        if self.dead:
            raise EngineDeadError(self.dead)
        number = next(self._numbers)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        self._writer.write(packed("call", number, name, arguments))
        try:
            return await answer
        finally:
            self._calls.pop(number, None)

    def follow_blocks(self, on_blocks: Callable[[Sequence[BlockChange]], None]) -> None:
        """Learn from now on which beginnings of prompts are in the cache; called in the order of the changes."""
        self._on_blocks = on_blocks
        self._writer.write(packed("follow_blocks"))

    async def close(self) -> None:
        """End the process; requests on their way end with it."""
        self._closing = True
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        try:
            await asyncio.wait_for(self._ended(), _CLOSE_S)
        except TimeoutError:
            self._process.kill()
            await self._ended()
        if self._reading is not None:
            await self._reading

    async def _read(self) -> None:
        """Hand on what the engine says, until it says nothing any more."""
        lost = ""
        while (frame := await receive(self._reader)) is not None:
            match frame:
                case ("lost", line):
                    lost = line
                case ("step", pieces):
                    streams = self._streams
                    for fields in pieces:
                        stream = streams.get(fields[0])
                        if stream is not None:
                            stream.take(Piece._make(fields))
                case ("blocks", changes):
                    self._on_blocks(changes)
                case ("accepted", request_id, count):
                    if (stream := self._streams.get(request_id)) is not None:
                        stream.num_prompt_tokens = count
                        stream.wake()
                case ("refused", request_id, kind, message):
                    if (stream := self._streams.get(request_id)) is not None:
                        stream.fail(_error(kind, message))
                case ("result", call_id, value):
                    if (answer := self._calls.get(call_id)) is not None and not answer.done():
                        answer.set_result(value)
                case ("error", call_id, kind, message):
                    if (answer := self._calls.get(call_id)) is not None and not answer.done():
                        answer.set_exception(_error(kind, message))
        how = "was closed" if self._closing else f"ended {await self._how_it_ended()}"
        self.dead = lost or f"the process that runs the engine {how}"
        error = EngineDeadError(self.dead)
        for stream in self._streams.values():
            stream.fail(error)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        if not self._closing:
            self.on_dead()

    async def _how_it_ended(self) -> str:
        """Wait until the process has ended, which its silence announced; return how."""
        try:
            code = await asyncio.wait_for(self._ended(), _CLOSE_S)
        except TimeoutError:
            self._process.kill()
            code = await self._ended()
        return f"by signal {-code}" if code < 0 else f"with exit code {code}"

    def _ended(self) -> Awaitable[int]:
        return asyncio.to_thread(self._process.wait)


def _error(kind: str, message: str) -> SeekforgeError:
    """Return the error that the engine met."""
    if kind == "QueueFullError":
        return QueueFullError(message)
    known = getattr(errors, kind, None) if kind else None
    if isinstance(known, type) and issubclass(known, SeekforgeError):
        return known(message)
    return RequestError(message) if kind else GenerationError(message, [])
