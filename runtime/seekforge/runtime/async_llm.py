"""`AsyncLLM`: the same engine for asyncio. A thread runs the steps; requests come and go from the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Self, Unpack

from seekforge.runtime.arguments import Prompt, refuse_best_of
from seekforge.runtime.chat.request import ChatOptions
from seekforge.runtime.engine.chat_output import AnswerReader
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.engine.outputs import Delta, RequestOutput
from seekforge.runtime.engine.request import raise_if_failed
from seekforge.runtime.llm import LLM, LLMOptions
from seekforge.runtime.llm_chat import Conversation
from seekforge.runtime.sampling.params import SamplingParams


class AsyncLLM:
    """An `LLM` served from a thread of its own. Use it as an async context manager, or `close` it.

    Cancelling a task that reads from it ends its request at the next step.

    Attributes:
        llm: the engine; its synchronous methods may be used at the same time.

    Example:
        >>> async with AsyncLLM("engine/") as llm:
        ...     async for delta in llm.stream("Once upon a time"):
        ...         print(delta.text, end="")
    """

    def __init__(
        self, engine: Engine | Path | str, *, max_waiting: int | None = 1024, **options: Unpack[LLMOptions]
    ) -> None:
        """Load an engine.

        Args:
            engine: an opened engine or its folder.
            max_waiting: most completions that wait; a request beyond is refused with `QueueFullError`.
            options: the keyword arguments of `LLM`.
        """
        self.llm = LLM(engine, max_waiting=max_waiting, **options)
        self._stopping = False
        #: What the step that runs has for readers, by event loop; passed on together when it has ended.
        self._arrived: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Delta], Delta]]] = {}
        self.llm._turns.after_deltas = self._pass_on
        self._thread = threading.Thread(target=self._serve, name="seekforge-steps", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """Answer one prompt; many calls at a time share the engine's steps. Arguments and errors as `LLM.generate`."""
        output = None
        async for delta in self._stream(prompt, sampling_params, priority=priority, timeout_s=timeout_s):
            output = delta.output
        assert output is not None
        return output

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Delta]:
        """Answer one prompt step by step. Arguments and errors as `LLM.stream`."""
        if isinstance(sampling_params, SamplingParams):
            refuse_best_of(sampling_params)
        async with aclosing(
            self._stream(prompt, sampling_params, priority=priority, timeout_s=timeout_s)
        ) as deltas:  # closing this generator ends the request at once
            async for delta in deltas:
                yield delta

    async def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncIterator[Delta]:
        """Answer one conversation step by step, as `LLM.chat_stream`; the last delta has the whole answer."""
        if isinstance(sampling_params, SamplingParams):
            refuse_best_of(sampling_params)
        # in another thread: a long conversation takes its time, and holds up no one else
        request = await asyncio.to_thread(self.llm.chat_request, messages, sampling_params, **options)
        reader = AnswerReader(request)
        async with aclosing(
            self._stream(request.prompt, request.params, priority=priority, timeout_s=timeout_s)
        ) as deltas:
            async for delta in deltas:
                yield reader.delta(delta)

    async def _stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None, *, priority: int, timeout_s: float | None
    ) -> AsyncGenerator[Delta, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta] = asyncio.Queue()

        def arrived(delta: Delta) -> None:  # called by the thread that runs the step, which alone does so
            self._arrived.setdefault(loop, []).append((queue, delta))

        # in another thread: a long prompt or a large grammar takes its time, and holds up no one else
        accepted, order, timeout = await asyncio.to_thread(
            self.llm.accept, prompt, sampling_params, priority=priority, timeout_s=timeout_s
        )
        (live,) = self.llm._start([accepted], [order], timeout, arrived)
        try:
            while True:
                delta = await queue.get()
                raise_if_failed(delta)
                yield delta
                if delta.output is not None:
                    return
        finally:
            self.llm._turns.drop([live])

    async def close(self) -> None:
        """End what is on its way, stop the thread and give back the engine's memory."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _close(self) -> None:
        self._stopping = True
        self.llm.close()
        self._thread.join()

    def _pass_on(self) -> None:
        """Give all readers what they gained; an event loop is woken once."""
        if self._arrived:
            ready, self._arrived = self._arrived, {}
            for loop, deltas in ready.items():
                with contextlib.suppress(RuntimeError):  # closed meanwhile: nobody reads any more
                    loop.call_soon_threadsafe(_put, deltas)

    def _serve(self) -> None:
        self.llm._turns.serve(lambda: self._stopping)


def _put(deltas: list[tuple[asyncio.Queue[Delta], Delta]]) -> None:
    for queue, delta in deltas:
        queue.put_nowait(delta)
