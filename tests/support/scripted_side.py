"""A side of a comparison that measures nothing: its options say what it answers."""

from __future__ import annotations

import os
from typing import Any

from tests.benchmarks.cpu.protocol import Clock, serve


def make(options: dict[str, Any], _clock: Clock) -> dict[str, Any]:
    if "refuses" in options:
        raise ValueError(options["refuses"])
    print("what a library prints", flush=True)

    def fail(words: str) -> float:
        raise RuntimeError(words)

    def end() -> float:
        os._exit(3)

    return {"add": lambda a, b: a + b, "fail": fail, "end": end}


if __name__ == "__main__":
    serve(make)
