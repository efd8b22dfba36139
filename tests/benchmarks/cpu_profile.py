"""Where a decode step of a CPU engine goes: ONNX Runtime's own profile of some steps, by operator. A script.

    python -m tests.benchmarks.cpu_profile ENGINE --context 512 [--batch 8] [--threads 2]

Times are of nodes, as ONNX Runtime's profiler sees them, which makes each of them a little slower; nodes inside of If
and Scan count for themselves and not again for those. What of a step no node has is the session's, and the rest the
runtime's around it. With several threads a node's time is that on the wall.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort
from tests.benchmarks.cpu.engine_side import EngineSide
from tests.benchmarks.cpu.rounds import Case, prompts

from seekforge.formats.engine.manifest import load_manifest

#: Operators that only run others.
_CONTAINERS: Final = frozenset({"If", "Scan", "Loop"})


@dataclass(frozen=True)
class Share:
    """What one operator takes of a step.

    Attributes:
        operator: its name; "session" is what no node has.
        nodes: runs of it in a step.
        microseconds: of all of them in a step.
    """

    operator: str
    nodes: float
    microseconds: float


def by_operator(profiles: Sequence[Sequence[dict[str, Any]]], steps: int) -> list[Share]:
    """Return the shares of the last `steps` runs of sessions, the largest first.

    Args:
        profiles: events of each session, as its profile file has them.
        steps: how many runs count; the session of the last run had all of them.
    """

    def runs_of(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted((one for one in events if one.get("name") == "model_run"), key=lambda one: one["ts"])

    events = max((one for one in profiles if runs_of(one)), key=lambda one: runs_of(one)[-1]["ts"])
    counted = runs_of(events)[-steps:]
    began, ended = counted[0]["ts"], counted[-1]["ts"] + counted[-1]["dur"]
    nodes: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        operator = event.get("args", {}).get("op_name")
        is_run = event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time")
        if not is_run or operator in _CONTAINERS or not began <= event["ts"] < ended:
            continue
        nodes[operator] += 1
        spent[operator] += event["dur"]
    shares = [Share(name, nodes[name] / steps, spent[name] / steps) for name in nodes]
    whole = sum(one["dur"] for one in counted) / steps
    shares.append(Share("session", 0, max(0.0, whole - sum(share.microseconds for share in shares))))
    return sorted(shares, key=lambda share: -share.microseconds)


def markdown(shares: Sequence[Share], step_us: float, most: int) -> str:
    """Return the table: the largest `most` operators, and what all take together."""
    lines = ["| operator | nodes a step | µs a step | of the step |", "|---|---|---|---|"]
    rest = shares[most:]
    shown = [*shares[:most]]
    if rest:
        shown.append(
            Share(f"{len(rest)} others", sum(one.nodes for one in rest), sum(one.microseconds for one in rest))
        )
    inside = sum(one.microseconds for one in shares)
    shown.append(Share("outside of ONNX Runtime", 0, max(0.0, step_us - inside)))
    for share in shown:
        count = f"{share.nodes:,.0f}" if share.nodes else "–"
        lines.append(f"| {share.operator} | {count} | {share.microseconds:,.0f} | {share.microseconds / step_us:.0%} |")
    nodes = sum(one.nodes for one in shares)
    lines.append(f"| **a step** | **{nodes:,.0f}** | **{step_us:,.0f}** | |")
    return "\n".join(lines)


def profile(engine: Path, context: int, *, batch: int, threads: int, steps: int) -> tuple[list[Share], float]:
    """Return the shares of a decode step, and what it takes on the wall in microseconds."""
    sessions: list[ort.InferenceSession] = []
    plain = ort.InferenceSession
    with tempfile.TemporaryDirectory() as folder:

        class Profiled(plain):  # whatever opens sessions opens these
            def __init__(self, path: Any, sess_options: Any = None, **keywords: Any) -> None:
                options = sess_options or ort.SessionOptions()
                options.enable_profiling = True
                options.profile_file_prefix = f"{folder}/{len(sessions)}"
                super().__init__(path, options, **keywords)
                sessions.append(self)

        ort.InferenceSession = Profiled  # type: ignore[misc]
        try:
            options = {
                "folder": str(engine),
                "threads": threads,
                "batch": batch,
                "tokens": batch * (context + steps + 64),
            }
            side = EngineSide(options, time.perf_counter)
            side.hold(prompts(Case("decode", context, batch), load_manifest(engine).vocab_size))
            side.decode(4)
            seconds = side.decode(steps)
        finally:
            ort.InferenceSession = plain  # type: ignore[misc]
        profiles = [json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")) for session in sessions]
        side.llm.close()
    return by_operator(profiles, steps), seconds / steps * 1e6


def main(words: Sequence[str] | None = None) -> int:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--most", type=int, default=12, help="operators with a row of their own")
    given = parser.parse_args(words)
    shares, step_us = profile(given.engine, given.context, batch=given.batch, threads=given.threads, steps=given.steps)
    print(markdown(shares, step_us, given.most))
    return 0


if __name__ == "__main__":
    sys.exit(main())
