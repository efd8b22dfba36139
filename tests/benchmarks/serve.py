"""What the server costs: a script, not a test. `python -m tests.benchmarks.serve ENGINE`

The engine's backend is replaced by one that does nothing, so that the runtime runs as fast as it can. By turns the
runtime runs alone, and its tokens are streamed to clients by the server; each time as many streams of as many tokens.
Of each the median: tokens per second, and what processor time the engine's process takes for a token, which is what the
server adds to the runtime where there are cores enough.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from seekforge.common.system import cpu_seconds
from seekforge.runtime.backends.null import FixedBackend
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import SamplingParams

_ROUNDS = 5
_PATHS = ("/v1/completions", "/v1/chat/completions")


def without_backend() -> None:
    """Let every engine of this process run on a backend that does nothing."""
    Engine.open_backend = lambda self, **_: FixedBackend(  # type: ignore[method-assign]
        self.manifest.vocab_size, self.manifest.num_top_logits
    )


def options_of(streams: int, tokens: int) -> dict[str, object]:
    """The options of `LLM` for so many streams of so many tokens."""
    return {
        "max_model_len": tokens + 64,
        "max_batch_size": streams,
        "num_blocks": streams * (tokens // 64 + 3) + 1,
        "self_check": False,
        "prefix_caching": False,
    }


def runtime_alone(engine: Path, streams: int, tokens: int) -> dict[str, float]:
    """The runtime in this process: tokens per second, and processor seconds of all of them."""
    without_backend()
    with LLM(engine, **options_of(streams, tokens)) as llm:  # type: ignore[arg-type]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        prompts = [[5, 6, 7, number % 50] for number in range(streams)]
        began, before = time.perf_counter(), cpu_seconds()
        for _ in llm.as_completed([(prompt, params) for prompt in prompts]):
            pass
        used = cpu_seconds() - before
        return {
            "tokens_per_second": streams * tokens / (time.perf_counter() - began),
            "engine_cpu_seconds": used,
        }


def serve(engine: Path, streams: int, tokens: int, port: int) -> None:
    """Serve such an engine until a signal comes."""
    from seekforge.runtime.server.serve import bound, run
    from seekforge.runtime.server.settings import ServerSettings

    def ready(facts: object) -> None:
        print("ready", flush=True)

    command = (sys.executable, "-m", "tests.benchmarks.serve", "--engine-process")
    settings = ServerSettings(engine=engine, served_model_names=("null",))
    with bound("127.0.0.1", port) as held:
        run(settings, options_of(streams, tokens), held, on_loading=lambda _: None, on_ready=ready, command=command)


async def stream(port: int, path: str, body: dict[str, object]) -> tuple[int, int, float]:
    """Read one streamed answer; returns chunks, bytes, and when the first one came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    chunks = size = 0
    first, tail = 0.0, b""
    while b"[DONE]" not in tail:
        piece = await reader.read(1 << 18)
        if not piece:
            raise SystemExit(f"the server closed the connection: {tail!r}")
        first = first or time.perf_counter()
        chunks += piece.count(b"data: {")
        size += len(piece)
        tail = (tail + piece)[-64:]
    writer.close()
    return chunks, size, first


async def clients(port: int, path: str, streams: int, tokens: int) -> dict[str, float]:
    """Read so many streams at once; what came in a second."""
    body: dict[str, object] = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": "go"}]
    else:
        body["prompt"] = [5, 6, 7]
    began = time.perf_counter()
    results = await asyncio.gather(*[stream(port, path, body) for _ in range(streams)])
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": streams * tokens / seconds,
        "chunks_per_second": sum(chunks for chunks, _, _ in results) / seconds,
        "megabytes_per_second": sum(size for _, size, _ in results) / seconds / 1e6,
        "client_cpu_seconds": cpu_seconds(),
        "seconds": seconds,
    }


def by_turns(engine: Path, streams: int, tokens: int) -> dict[str, list[dict[str, float]]]:
    """Run all by turns; each round of the runtime alone and of each interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = ["--streams", str(streams), "--tokens", str(tokens)]
    this = [sys.executable, "-m", "tests.benchmarks.serve"]
    server = subprocess.Popen([*this, str(engine), *sizes, "--serve", str(port)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    out: dict[str, list[dict[str, float]]] = {"alone": [], **{path: [] for path in _PATHS}}
    try:
        if server.stdout.readline() != "ready\n":
            raise SystemExit("the server did not start")
        for _ in range(_ROUNDS):
            out["alone"].append(_run([*this, str(engine), *sizes, "--alone"]))
            for path in _PATHS:
                before = _cpu_of(server.pid)
                one = _run([*this, *sizes, "--clients", f"{port}{path}"])
                after = _cpu_of(server.pid)
                out[path].append(one | {f"{name}_cpu_seconds": after[name] - before[name] for name in after})
        return out
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _run(command: list[str]) -> dict[str, float]:
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _cpu_of(server: int) -> dict[str, float]:
    """Processor time of the server and of the engine's process, which it started."""
    (child,) = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    tick = os.sysconf("SC_CLK_TCK")
    times = {}
    for name, pid in (("server", str(server)), ("engine", child)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        times[name] = (int(fields[11]) + int(fields[12])) / tick
    return times


def main() -> None:
    if sys.argv[1:2] == ["--engine-process"]:
        from seekforge.runtime.server import engine_process

        without_backend()
        del sys.argv[1]
        engine_process.main()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path, nargs="?")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--clients", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    streams, tokens = arguments.streams, arguments.tokens
    if arguments.clients:
        port, _, path = arguments.clients.partition("/")
        print(json.dumps(asyncio.run(clients(int(port), "/" + path, streams, tokens))))
        return
    if arguments.serve:
        serve(arguments.engine, streams, tokens, arguments.serve)
        return
    if arguments.alone:
        print(json.dumps(runtime_alone(arguments.engine, streams, tokens)))
        return
    rounds = by_turns(arguments.engine, streams, tokens)
    middle = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]} for name, each in rounds.items()
    }
    if arguments.json:
        print(json.dumps({"streams": streams, "tokens": tokens, "medians": middle, "rounds": rounds}))
        return
    count = streams * tokens
    print(f"{streams} streams of {tokens} tokens on {os.cpu_count()} cores, medians of {_ROUNDS} rounds by turns")
    for name, one in middle.items():
        spent, rate = one["engine_cpu_seconds"], one["tokens_per_second"]
        line = f"  {name:<22}{rate:8,.0f} tokens/s; CPU time a token: engine {1e6 * spent / count:.1f} µs"
        if name != "alone":
            line += f" ({spent / middle['alone']['engine_cpu_seconds']:.2f}x)"
            line += (
                f", server {1e6 * one['server_cpu_seconds'] / count:.1f} µs; {one['chunks_per_second']:,.0f} chunks/s"
            )
        print(line)


if __name__ == "__main__":
    main()
