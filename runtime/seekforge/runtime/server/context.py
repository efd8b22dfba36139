"""What every handler has: the engine, the tokenizer, settings and counters; and one request of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from starlette.types import ASGIApp, Receive

from seekforge.common.errors import RequestError
from seekforge.runtime.chat import ChatProcessor
from seekforge.runtime.openai.protocol import BodyError
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.server.channel import Piece
from seekforge.runtime.server.engine_client import EngineClient, Stream
from seekforge.runtime.server.errors import APIError, as_api_error
from seekforge.runtime.server.metrics import Metrics
from seekforge.runtime.server.settings import ServerSettings
from seekforge.runtime.server.sse import EventStream, event, unless_gone
from seekforge.runtime.text.tokenizer import Tokenizer

_T = TypeVar("_T")

log = logging.getLogger("seekforge.server")

#: Up to so many characters a text is encoded at once, and not by another thread.
_SHORT = 4096
#: A prompt that is truncated may have so many times the tokens that the engine takes.
_CUT_FROM = 8
#: Most prompts of one body.
MAX_PROMPTS = 1024


@dataclass
class Context:
    """The parts of one server.

    Attributes:
        client: the engine.
        settings: what the server was told.
        tokenizer: the engine's.
        chat: makes requests of conversations.
        metrics: the counters.
        started: when it began to serve, seconds since 1970.
        draining: why no more requests are taken; nothing while they are.
        num_running: requests that are on their way.
    """

    client: EngineClient
    settings: ServerSettings
    tokenizer: Tokenizer
    chat: ChatProcessor
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))
    draining: str = ""
    num_running: int = 0

    @property
    def defaults(self) -> SamplingParams:
        """What the checkpoint recommends."""
        return self.client.facts["default_sampling_params"]

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request."""
        return self.client.facts["max_model_len"]

    @property
    def model_name(self) -> str:
        """The name that answers say."""
        return self.settings.served_model_names[0]

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served.

        Raises:
            APIError: 404.
        """
        if name is not None and name not in self.settings.served_model_names:
            served = ", ".join(map(repr, self.settings.served_model_names))
            raise APIError(
                404, f"the model {name[:200]!r} is not served here; there is {served}", "model", "model_not_found"
            )

    def longest_prompt(self, params: SamplingParams) -> int:
        """Return how many tokens a prompt may have before the engine cuts off what `truncate_prompt_tokens` says."""
        return self.max_model_len * (1 if params.truncate_prompt_tokens is None else _CUT_FROM)

    async def encode(self, text: str, params: SamplingParams) -> Sequence[int]:
        """Return the tokens of a prompt, of which the engine cuts off what `truncate_prompt_tokens` says.

        Raises:
            RequestError: it is far too long, or no valid Unicode.
        """
        most = self.longest_prompt(params)
        if len(text) <= _SHORT:
            return self.tokenizer.encode_at_most(text, most)
        return await asyncio.to_thread(self.tokenizer.encode_at_most, text, most)


@dataclass
class Call:
    """One request of HTTP.

    Attributes:
        context: the server.
        request_id: names it in answers and logs.
        path: the path that was called.
        body: the decoded JSON; None where there is none.
        receive: what ASGI gives to read the request with.
        errors: shape of its errors.
        created: when it came, seconds since 1970.
        log: what the line in the log says beside the ordinary.
    """

    context: Context
    request_id: str
    path: str
    body: Any
    receive: Receive
    errors: Literal["openai", "anthropic"] = "openai"
    created: int = field(default_factory=lambda: int(time.time()))
    log: dict[str, Any] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def streams(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        priority: int = 0,
        *,
        in_reasoning: bool = False,
    ) -> AsyncGenerator[list[Stream], None]:
        """Start a request for each prompt; they are ended when the context is left, whatever happens.

        Raises:
            RequestError: one cannot be served; none is.
        """
        client, started = self.context.client, list[Stream]()
        self._check_logprobs(params)
        try:
            for ids in prompts:
                started.append(
                    client.start(
                        ids,
                        params,
                        priority=priority,
                        timeout_s=self.context.settings.request_timeout_s,
                        in_reasoning=in_reasoning,
                    )
                )
            for number, stream in enumerate(started):
                try:
                    await stream.accepted()
                except RequestError as error:
                    raise (error if len(started) == 1 else _numbered(error, number)) from None
            self.log["prompt_tokens"] = sum(stream.num_prompt_tokens for stream in started)
            yield started
        finally:
            for stream in started:
                stream.close()

    def _check_logprobs(self, params: SamplingParams) -> None:
        """Refuse more log-probabilities than a server gives: with all of a vocabulary an answer has no bounds."""
        most = self.context.settings.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if most >= 0 and wanted is not None and not 0 <= wanted <= most:
                raise BodyError(
                    f"{name} is {wanted}, expected at most {most}; the server's --max-logprobs says so", name
                )

    async def unless_gone(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Return what `work` gives; end it when the client goes away.

        Raises:
            ClientGoneError: it went away.
        """
        return await unless_gone(work, self.receive)

    async def event_stream(self, events: AsyncGenerator[bytes, None]) -> ASGIApp:
        """Return an answer that streams; what is wrong with the request is raised here, before it begins."""
        first = await self.unless_gone(_first(events))

        return EventStream(
            first,
            events,
            headers=[(b"x-request-id", self.request_id.encode())],
            write_timeout_s=self.context.settings.write_timeout_s,
            on_error=self._failed,
        )

    def _failed(self, error: Exception) -> bytes:
        told = as_api_error(error)
        if told is None:
            log.error("request %s", self.request_id, exc_info=error)
        self.log["error"] = (told.code or told.kind) if told else "server_error"
        shown = told or APIError(500, f"an internal error; the log has it under {self.request_id}")
        if self.errors == "anthropic":
            return event(shown.anthropic_body(), "error")
        return event(shown.body())


async def merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, list[Piece]], None]:
    """Give what comes of several streams as it comes: (number of the stream, pieces)."""
    if len(streams) == 1:
        (stream,) = streams
        ended = False
        while not ended:
            pieces = await stream.read()
            ended = pieces[-1].end is not None
            yield 0, pieces
        return
    waiting = {asyncio.ensure_future(stream.read()): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, pieces = waiting.pop(task), task.result()
                if pieces[-1].end is None:
                    waiting[asyncio.ensure_future(streams[number].read())] = number
                yield number, pieces
    finally:
        for task in waiting:
            task.cancel()


def _numbered(error: RequestError, number: int) -> RequestError:
    message = f"prompt {number}: {error}"
    return BodyError(message, error.param) if isinstance(error, BodyError) else type(error)(message)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    try:
        return await anext(events)
    except StopAsyncIteration:
        return b""
    except BaseException:
        await events.aclose()
        raise
