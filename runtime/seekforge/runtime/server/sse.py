"""Server-sent events over plain ASGI: each write carries all that has come, and a client that goes away is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

_T = TypeVar("_T")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # of nginx, which would collect events
]

#: What `str.splitlines` ends a line at, beside the characters that JSON escapes.
_SEPARATORS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def event(data: Any, name: str | None = None) -> bytes:
    """Return an event with JSON, under a name where the interface has them."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json_text(data)}\n\n".encode()


def json_text(value: Any) -> str:
    """Return JSON on one line, also for readers that take Unicode's separators for ends of lines."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else text.translate(_SEPARATORS)


class ClientGoneError(Exception):
    """The client has closed the connection, or takes nothing any more."""


async def unless_gone(work: Coroutine[Any, Any, _T], receive: Receive) -> _T:
    """Return what `work` gives; end it when the client goes away.

    Raises:
        ClientGoneError: it went away, or `work` cancelled itself since it takes nothing any more.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done() or working.cancelled():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


class EventStream:
    """An answer whose body is what a generator makes; the generator is closed in any case.

    Attributes:
        status: the status of HTTP, for the log.
    """

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        *,
        headers: list[tuple[bytes, bytes]],
        write_timeout_s: float,
        on_error: Any,
    ) -> None:
        """Make one.

        Args:
            first: bytes of whole events; may be none.
            events: gives more of them, as many as there are.
            headers: further headers.
            write_timeout_s: a client that takes nothing for so long is gone.
            on_error: called with an exception that `events` raised; returns the last bytes that are sent.
        """
        self.status = 200
        self._first, self._events, self._headers = first, events, headers
        self._write_timeout_s, self._on_error = write_timeout_s, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all.

        Raises:
            ClientGoneError: nobody reads any more.
        """
        try:
            await unless_gone(self._send_all(send), receive)
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        sending = asyncio.current_task()
        assert sending is not None

        async def write(chunk: bytes) -> None:
            # a timer of its own costs less than a context for a timeout around each write
            timer = loop.call_later(self._write_timeout_s, sending.cancel)
            try:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            finally:
                timer.cancel()

        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *self._headers]})
        try:
            if self._first:
                await write(self._first)
            async for chunk in self._events:
                await write(chunk)
            last = b""
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            last = self._on_error(error)
        await send({"type": "http.response.body", "body": last})


async def _left(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
