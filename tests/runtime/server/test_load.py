"""Many clients for minutes, some of which leave or send nonsense: answers stay what they are alone, nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.served import engine_of, served

_SECONDS = float(os.environ.get("SEEKFORGE_LOAD_SECONDS", "120"))
_CLIENTS = 64
#: Growth of memory that is no leak: caches of texts, of grammars, the allocator's.
_GROWTH_MB = 24


def body_of(number: int) -> dict[str, Any]:
    """One of some requests; the same number is the same request."""
    rng = random.Random(number)
    return {
        "prompt": [rng.randrange(2, 300) for _ in range(rng.randrange(1, 90))],
        "max_tokens": rng.randrange(1, 60),
        "temperature": rng.choice((0, 0.7, 1.0)),
        "seed": number,
        "ignore_eos": True,
        "logprobs": rng.choice((None, 2)),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def sent(port: int, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return reader, writer


async def answer(port: int, number: int) -> tuple[str, Any]:
    """Return the text and the usage of a whole streamed answer."""
    reader, writer = await sent(port, "/v1/completions", json.dumps(body_of(number)).encode())
    try:
        raw = (await reader.read()).decode()
    finally:
        writer.close()
    assert raw.startswith("HTTP/1.1 200"), raw[:300]
    assert "data: [DONE]" in raw, raw[-300:]
    text, usage = "", None
    for line in raw.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            usage = event.get("usage") or usage
    return text, usage


async def nonsense(port: int, rng: random.Random) -> None:
    """Send what is refused, and see that it is."""
    body, status = rng.choice(
        [
            (b"{", 400),
            (b'{"prompt": ""}', 400),
            (b'{"prompt": "a", "temperature": -1}', 400),
            (b'{"prompt": "a", "model": "other"}', 404),
            (b'{"prompt": [99999999]}', 400),
            (b'{"prompt": "a", "max_tokens": 100000}', 400),
        ]
    )
    reader, writer = await sent(port, "/v1/completions", body)
    line = await reader.readline()
    assert line.startswith(f"HTTP/1.1 {status}".encode()), (body, line)
    writer.close()


async def leave(port: int, rng: random.Random) -> None:
    """Begin a long answer and go away."""
    body = body_of(rng.randrange(1 << 30)) | {"max_tokens": 150, "stream": rng.random() < 0.8}
    reader, writer = await sent(port, "/v1/completions", json.dumps(body).encode())
    if rng.random() < 0.7:
        await reader.read(rng.randrange(1, 4000))
    writer.close()


def memory_mb(pid: int) -> float:
    """Memory of a process that no file stands behind."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")


def facts(pid: int) -> tuple[int, int]:
    """Descriptors and threads of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(int(_SECONDS) + 300)
def test_sixty_four_clients_get_what_each_gets_alone(toy_engine: Path) -> None:
    with served(toy_engine, "0", "--deterministic") as (process, url, _):
        port, engine = int(url.rpartition(":")[2]), engine_of(process)
        counts = {"answers": 0, "nonsense": 0, "left": 0}

        async def main() -> None:
            alone = {number: await answer(port, number) for number in range(40)}
            ends = time.monotonic() + _SECONDS

            async def client(seed: int, until: float) -> None:
                rng = random.Random(seed)
                while time.monotonic() < until:
                    kind = rng.random()
                    if kind < 0.15:
                        await nonsense(port, rng)
                        counts["nonsense"] += 1
                    elif kind < 0.3:
                        await leave(port, rng)
                        counts["left"] += 1
                    else:
                        number = rng.randrange(len(alone))
                        text, usage = await answer(port, number)
                        assert text == alone[number][0], number
                        assert usage["completion_tokens"] == alone[number][1]["completion_tokens"]
                        counts["answers"] += 1

            async def all_clients(until: float, first: int) -> None:
                await asyncio.gather(*[client(first + seed, until) for seed in range(_CLIENTS)])

            await all_clients(time.monotonic() + _SECONDS / 4, 0)
            await asyncio.sleep(1)
            before = [(*facts(pid), memory_mb(pid)) for pid in (process.pid, engine)]
            await all_clients(ends, 1000)
            await idle(port)
            after = [(*facts(pid), memory_mb(pid)) for pid in (process.pid, engine)]
            for (files, threads, memory), (files_now, threads_now, memory_now) in zip(before, after, strict=True):
                assert files_now <= files + 1 and threads_now <= threads + 1, (before, after)
                assert memory_now <= memory + _GROWTH_MB, (before, after)
            for number, expected in alone.items():
                assert (await answer(port, number))[0] == expected[0]

        asyncio.run(main())
    assert all(counts.values()), counts
    print(counts)


async def idle(port: int) -> None:
    """Wait until every block is free and no request is on its way."""
    deadline = time.monotonic() + 30
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /engine HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        raw = (await reader.read()).decode()
        writer.close()
        now = json.loads(raw.partition("\r\n\r\n")[2])
        if now["kv_cache_usage"] == 0 and now["num_requests_running"] == now["num_requests_waiting"] == 0:
            return
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.05)
