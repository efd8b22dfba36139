"""What is left of a stream however it ends: nothing that runs on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from seekforge.runtime.server.sse import ClientGoneError, EventStream


class Recorder:
    """Events that note whether they were closed, and a client that takes them."""

    def __init__(self, *, fails: str = "", hangs: bool = False) -> None:
        self.closed = False
        self.sent: list[bytes] = []
        self._fails, self._hangs = fails, hangs

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            yield b"first"
            yield b"second"
        finally:
            self.closed = True

    async def send(self, message: Any) -> None:
        if message["type"] == self._fails:
            raise OSError("the connection is closed")
        if message["type"] == "http.response.body":
            self.sent.append(message["body"])
            if self._hangs:
                await asyncio.sleep(60)

    async def receive(self) -> Any:
        await asyncio.sleep(60)

    async def run(self) -> None:
        events = self.events()
        first = await anext(events)
        stream = EventStream(first, events, headers=[], write_timeout_s=0.05, on_error=lambda error: b"error")
        await stream({}, self.receive, self.send)


def test_what_came_first_is_sent_first() -> None:
    recorder = Recorder()
    asyncio.run(recorder.run())
    assert recorder.sent == [b"first", b"second", b""] and recorder.closed


def test_a_client_that_takes_nothing_is_gone() -> None:
    recorder = Recorder(hangs=True)
    with pytest.raises(ClientGoneError):
        asyncio.run(recorder.run())
    assert recorder.closed


def test_a_connection_that_fails_before_the_first_byte_ends_the_request() -> None:
    recorder = Recorder(fails="http.response.start")
    with pytest.raises(OSError, match="closed"):
        asyncio.run(recorder.run())
    assert recorder.closed
