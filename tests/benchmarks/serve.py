"""What the server costs: a script, not a test. `python -m tests.benchmarks.serve ENGINE`

The engine's backend is replaced by one that does nothing, so that the runtime runs as fast as it can. Three numbers of
tokens per second, each of as many streams: the runtime alone, in a process of its own; the engine's process while the
server streams its tokens to clients; and what those clients read, of single tokens, chat and completions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from seekforge.common.system import cpu_seconds
from seekforge.runtime.backends.null import FixedBackend
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import SamplingParams

_ROUNDS = 3


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


def runtime_alone(engine: Path, streams: int, tokens: int) -> float:
    """Tokens per second of the runtime in this process."""
    without_backend()
    with LLM(engine, **options_of(streams, tokens)) as llm:  # type: ignore[arg-type]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        prompts = [[5, 6, 7, number % 50] for number in range(streams)]
        rates = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            llm.generate(prompts, params)
            rates.append(streams * tokens / (time.perf_counter() - began))
    return max(rates)


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


def through_server(engine: Path, streams: int, tokens: int) -> dict[str, dict[str, float]]:
    """Start server and clients; what each interface streamed at best."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = ["--streams", str(streams), "--tokens", str(tokens)]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.serve", str(engine), *sizes, "--serve", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        if server.stdout.readline() != "ready\n":
            raise SystemExit("the server did not start")
        out = {}
        for path in ("/v1/completions", "/v1/chat/completions"):
            rounds = []
            for _ in range(_ROUNDS):
                before = _cpu_of(server.pid)
                client = subprocess.run(
                    [sys.executable, "-m", "tests.benchmarks.serve", *sizes, "--clients", f"{port}{path}"],
                    stdout=subprocess.PIPE,
                    check=True,
                )
                after = _cpu_of(server.pid)
                one = json.loads(client.stdout)
                one |= {f"{name}_cpu_seconds": after[name] - before[name] for name in after}
                rounds.append(one)
            out[path] = max(rounds, key=lambda one: one["tokens_per_second"])
        return out
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


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
        print(runtime_alone(arguments.engine, streams, tokens))
        return
    sizes = ["--streams", str(streams), "--tokens", str(tokens)]
    alone = float(
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.serve", str(arguments.engine), *sizes, "--alone"],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    result = {"streams": streams, "runtime_alone": alone, "server": through_server(arguments.engine, streams, tokens)}
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{streams} streams of {tokens} tokens, tokens per second, on {os.cpu_count()} cores")
    print(f"  {'the runtime alone':<24}{alone:10,.0f}")
    for path, one in result["server"].items():
        print(
            f"  {path:<24}{one['tokens_per_second']:10,.0f}  {one['chunks_per_second']:,.0f} chunks/s; CPU seconds: "
            f"engine {one['engine_cpu_seconds']:.2f}, server {one['server_cpu_seconds']:.2f} of {one['seconds']:.2f}"
        )


if __name__ == "__main__":
    main()
