"""What Ray is told of an engine, and what a replica does, without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from seekforge.common.errors import EngineError
from seekforge.common.records import RecordError
from seekforge.runtime.ray.application import ApplicationArguments, make_replica_app


@pytest.mark.parametrize("odd", [{"engin": "e"}, {"num_replicas": 0}, {"threads": "many"}, {"self_check": 1}])
def test_odd_arguments_are_named(odd: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match=next(iter(odd))):
        ApplicationArguments.model_validate({"engine": "e", **odd})


async def lived(app: Any, work: Callable[[], Awaitable[None]]) -> list[dict[str, Any]]:
    """Start an application, do something, end it; returns what it said."""
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: list[dict[str, Any]] = []
    started = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        said.append(message)
        started.set()

    living = asyncio.create_task(app({"type": "lifespan"}, messages.get, send))
    messages.put_nowait({"type": "lifespan.startup"})
    await started.wait()
    if said[0]["type"] == "lifespan.startup.complete":
        await work()
        messages.put_nowait({"type": "lifespan.shutdown"})
    await living
    return said


async def get(app: Any, path: str, **headers: str) -> int:
    """Return the status of an answer."""
    answer: list[Any] = []
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        answer.append(message)

    await app(scope, receive, send)
    return answer[0]["status"]


def test_a_replica_serves_while_it_lives(toy_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEKFORGE_API_KEY", "one two")
    app = make_replica_app(ApplicationArguments(engine=str(toy_engine), kv_cache_memory=1 << 22))

    async def work() -> None:
        assert await get(app, "/ready") == 200
        assert await get(app, "/v1/models") == 401
        assert await get(app, "/v1/models", authorization="Bearer two") == 200
        app.check()

    async def main() -> None:
        with pytest.raises(EngineError, match="begins or ends"):
            await get(app, "/ready")
        said = await lived(app, work)
        assert [one["type"] for one in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    asyncio.run(main())


def test_a_replica_whose_engine_cannot_be_opened_says_why(tmp_path: Path) -> None:
    app = make_replica_app(ApplicationArguments(engine=str(tmp_path)))
    (said,) = asyncio.run(lived(app, lambda: asyncio.sleep(0)))
    assert said["type"] == "lifespan.startup.failed" and "manifest.json" in said["message"]


def test_a_replica_whose_engine_is_killed_ends(toy_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray then starts another one; requests have a moment to learn of it."""
    ended: list[int] = []
    monkeypatch.setattr("seekforge.runtime.ray.replica._LAST_WORDS_S", 0.01)
    app = make_replica_app(ApplicationArguments(engine=str(toy_engine), kv_cache_memory=1 << 22))
    app._end = lambda: ended.append(1)

    async def work() -> None:
        os.kill(app._client.process_id, signal.SIGKILL)
        async with asyncio.timeout(20):
            while not ended:
                await asyncio.sleep(0.01)
        assert await get(app, "/ready") == 503
        with pytest.raises(EngineError, match="signal 9"):
            app.check()

    asyncio.run(lived(app, work))


class FakeRanks:
    """Other ranks that remember what happens to them."""

    def __init__(self) -> None:
        self.lose: Callable[[str], None] = lambda line: None
        self.closed: list[float | None] = []

    async def start(self, on_lost: Callable[[str], None]) -> dict[str, str]:
        self.lose = on_lost
        return {"SEEKFORGE_TEST": "0"}

    async def close(self, patience_s: float | None = None) -> None:
        self.closed.append(patience_s)


def test_a_replica_that_loses_a_rank_ends_with_a_line_that_names_it(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("seekforge.runtime.ray.replica._LAST_WORDS_S", 0.01)
    ended: list[int] = []
    app = make_replica_app(ApplicationArguments(engine=str(toy_engine), kv_cache_memory=1 << 22))
    ranks = FakeRanks()
    app._ranks, app._end = ranks, lambda: ended.append(1)

    async def work() -> None:
        variables = Path(f"/proc/{app._client.process_id}/environ").read_bytes()
        assert b"SEEKFORGE_TEST=0" in variables.split(b"\0")
        app.check()
        ranks.lose("rank 1 was ended by signal 9")
        ranks.lose("rank 2 ended with exit code 1")  # which it did because of the other
        async with asyncio.timeout(20):
            while not ended:
                await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match=r"^rank 1 was ended by signal 9$"):
            app.check()

    asyncio.run(lived(app, work))
    assert len(ended) == 1 and ranks.closed == [None]
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"error: {toy_engine}: rank 1 was ended by signal 9; the replica ends"


def test_a_rank_that_is_lost_while_the_engine_opens_is_why_the_replica_does_not_start(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 would wait minutes for it."""
    ranks, stopped = FakeRanks(), []

    async def never(*_: object, **__: object) -> None:
        ranks.lose("rank 1 ended with exit code 2: no manifest.json")
        try:
            await asyncio.sleep(600)
        finally:
            stopped.append(1)

    monkeypatch.setattr("seekforge.runtime.ray.replica.EngineProcess.open", never)
    app = make_replica_app(ApplicationArguments(engine=str(toy_engine)))
    app._ranks = ranks
    (said,) = asyncio.run(lived(app, lambda: asyncio.sleep(0)))
    assert said == {
        "type": "lifespan.startup.failed",
        "message": "rank 1 ended with exit code 2: no manifest.json",
    }
    assert stopped and ranks.closed == [0.0]
