"""What Ray is told of an engine, and what a replica does, without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seekforge.common.errors import EngineError
from seekforge.common.records import RecordError
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.ray.application import ApplicationArguments, make_replica_app, resources_of


@pytest.mark.parametrize(
    ("ranks", "backend", "expected"),
    [
        (None, "onnxruntime", {"CPU": 2.0, "GPU": 0.0}),
        (Parallelism(tp=2, pp=2), "onnxruntime", {"CPU": 8.0, "GPU": 0.0}),
        (Parallelism(tp=8), "tensorrt", {"CPU": 16.0, "GPU": 8.0}),
        (None, "tensorrt-rtx", {"CPU": 2.0, "GPU": 1.0}),
    ],
)
def test_a_bundle_has_the_cores_and_gpus_of_all_ranks(
    toy_engine: Path, ranks: Parallelism | None, backend: Any, expected: dict[str, float]
) -> None:
    manifest: Any = SimpleNamespace(
        ranks=None if ranks is None else SimpleNamespace(parallelism=ranks),
        target=replace(load_manifest(toy_engine).target, backend=backend),
    )
    assert resources_of(manifest, 2) == expected


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
