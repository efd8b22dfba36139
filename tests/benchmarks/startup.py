"""What starting costs beyond the engine's own load: a script, not a test (`bench_startup.py [ENGINE]`).

Each round is a fresh process. It times, one after the other: the libraries that the engine itself needs (numpy, its
backend's, tokenizers), the import of the runtime, and `LLM(engine)`, of which the graphs, the tokenizer, the digests
of the files and the self-check are listed apart. What is left, with the import, is the runtime's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.toy_engine import write_toy_engine

ROUNDS = 9
#: What counts as the engine's own load.
LOAD = ("libraries", "graphs", "tokenizer", "digests", "self-check")


class Clock:
    """Adds up what parts of a process take: wall and processor seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, function):
        """Return `function` with its time added to `name`."""

        def timed(*args, **kwargs):
            began = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                total = self.seconds.setdefault(name, [0.0, 0.0])
                total[0] += time.perf_counter() - began[0]
                total[1] += time.process_time() - began[1]

        return timed


def start(engine: str) -> dict[str, list[float]]:
    """Start once, in this process, and return seconds (wall, processor) by part."""
    clock = Clock()
    clock("libraries", lambda: [__import__(name) for name in ("numpy", "onnxruntime", "tokenizers")])()
    clock("import", lambda: __import__("seekforge.runtime.llm"))()
    from seekforge.runtime import llm
    from seekforge.runtime.backends import onnxruntime as backend
    from seekforge.runtime.engine import engine_folder as opened

    backend.OrtGraph = clock("graphs", backend.OrtGraph)  # pyright: ignore[reportAttributeAccessIssue]
    opened.Tokenizer = clock("tokenizer", opened.Tokenizer)  # pyright: ignore[reportAttributeAccessIssue]
    opened.verify_files = clock("digests", opened.verify_files)
    llm.run_self_check = clock("self-check", llm.run_self_check)
    clock("LLM", llm.LLM)(engine, num_blocks=9).close()
    for name in LOAD[1:]:
        for kind, value in enumerate(clock.seconds.get(name, (0.0, 0.0))):
            clock.seconds["LLM"][kind] -= value
    return clock.seconds


def toy_engine(folder: Path) -> Path:
    """Write the engine that the tests run on."""
    write_toy_engine(folder / "engine")
    return folder / "engine"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", nargs="?", help="an engine of target cpu; a toy without it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(start(arguments.engine)))
        return
    with tempfile.TemporaryDirectory() as folder:
        engine = arguments.engine or str(toy_engine(Path(folder)))
        command = [sys.executable, "-m", "tests.benchmarks.startup", engine, "--once"]
        rounds = [json.loads(subprocess.check_output(command)) for _ in range(arguments.rounds)]
    for one in rounds:
        one["the runtime's own"] = [sum(pair) for pair in zip(one["import"], one["LLM"], strict=True)]
    result = {
        name: [round(statistics.median(one[name][kind] for one in rounds), 4) for kind in (0, 1)]
        + [round(min(one[name][kind] for one in rounds), 4) for kind in (0, 1)]
        for name in rounds[0]
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"seconds, {len(rounds)} processes    median: wall      cpu    least: wall      cpu")
    for name, (wall, cpu, least_wall, least_cpu) in result.items():
        mark = "  (engine's load)" if name in LOAD else "  (aim 0.3)" if name.startswith("the ") else ""
        print(f"{name:<20}{wall:16.3f}{cpu:9.3f}{least_wall:15.3f}{least_cpu:9.3f}{mark}")


if __name__ == "__main__":
    main()
