"""Decode and prefill of CPU engines against transformers' eager FP32 model on one checkpoint: a script, not a test.

python -m tests.benchmarks.cpu CHECKPOINT ENGINE [ENGINE ...] [--threads 2]

Engines (f32, int8, int4) are of exact numerics, since transformers computes no FP8. In every round all sides take one
turn and the memory is read once, so that a busy machine slows all alike: speeds are medians over rounds, and a factor
is the median of the rounds' own factors. The last lines are tables for the docs. `read` is the share of the sustained
read bandwidth, measured in the same rounds by summing an array, that a decode step makes of the weights it needs.

On a machine that does other work, `--cpu-time` with one thread counts processor seconds in place of those on the wall.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tests.support.oracle import load_oracle, write_dequantized

from seekforge.common.dtypes import itemsize
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.program import load_bindings
from seekforge.runtime import LLM, SamplingParams

#: Bytes of the array whose sum measures the memory; far beyond any cache.
_READ_BYTES = 1 << 29
#: Runs one prompt and decodes some tokens; returns seconds of both.
Run = Callable[[list[int], int], tuple[float, float]]
#: Returns seconds.
Clock = Callable[[], float]


@dataclass
class Side:
    """One contender. `step_bytes`: of weights that a decode step reads; None where that is not known."""

    name: str
    run: Run
    step_bytes: int | None = None
    turns: list[tuple[float, float]] = field(default_factory=list)


class Transformers:
    """The independent model, with its own cache."""

    def __init__(self, checkpoint: Path, clock: Clock) -> None:
        self.clock = clock
        with tempfile.TemporaryDirectory() as folder:
            self.model = load_oracle(write_dequantized(checkpoint, Path(folder) / "f32"))

    @torch.inference_mode()
    def run(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Return seconds of the prompt and of `count` decoded tokens."""
        began = self.clock()
        out = self.model(torch.tensor([prompt]), use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        middle = self.clock()
        for _ in range(count):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return middle - began, self.clock() - middle


def open_engine(folder: Path, threads: int, longest: int, clock: Clock) -> tuple[LLM, Side]:
    """Open an engine and return it with the side that runs it."""
    llm = LLM(folder, threads=threads, max_batch_size=1, num_blocks=longest // 64 + 4, prefix_caching=False)

    def run(prompt: list[int], count: int) -> tuple[float, float]:
        began = clock()
        times = []
        params = SamplingParams(temperature=0, max_tokens=count + 1, ignore_eos=True)
        for delta in llm.stream(prompt, params):
            times += [clock()] * len(delta.token_ids)
        return times[0] - began, times[-1] - times[0]

    return llm, Side(load_manifest(folder).build["precision"], run, step_bytes(folder))


def step_bytes(folder: Path) -> int:
    """Return the bytes of weights that one decode step needs: all but tables, embedding and experts not chosen."""
    config = load_manifest(folder).config
    share = config["num_experts_per_tok"] / config["n_routed_experts"]
    total = 0.0
    for name, recipe in load_bindings(folder)["model"].items():
        if name.startswith(("rope_", "embed_tokens")):
            continue
        size = math.prod(recipe.shape) * itemsize(recipe.dtype)
        total += size * (share if ".mlp.experts." in name else 1)
    return round(total)


def read_bandwidth(array: torch.Tensor, clock: Clock) -> float:
    """Return bytes a second of reading `array` once."""
    began = clock()
    array.sum()
    return array.numel() * 4 / (clock() - began)


def compare(sides: list[Side], context: int, tokens: int, rounds: int, array: torch.Tensor, clock: Clock) -> float:
    """Give every side `rounds` turns of one prompt; return the median read bandwidth."""
    prompt = np.random.default_rng(context).integers(2, 1000, context).tolist()
    read = []
    for side in sides:
        side.turns.clear()
        side.run(prompt[:8], 2)  # memory is touched before the clock runs
    for _ in range(rounds):
        read.append(read_bandwidth(array, clock))
        for side in sides:
            side.turns.append(side.run(prompt, tokens))
    return statistics.median(read)


def row(sides: list[Side], context: int, tokens: int, bandwidth: float) -> dict[str, object]:
    """Return what one context gave."""
    first = sides[0]
    found: dict[str, object] = {"context": context, "read_bytes_per_s": bandwidth}
    for side in sides:
        factor = [
            statistics.median(a[part] / b[part] for a, b in zip(first.turns, side.turns, strict=True))
            for part in (0, 1)
        ]
        prefill, decode = (statistics.median(turn[part] for turn in side.turns) for part in (0, 1))
        found[side.name] = {
            "prefill": context / prefill,
            "prefill_factor": factor[0],
            "decode": tokens / decode,
            "decode_factor": factor[1],
            "read_share": None if side.step_bytes is None else side.step_bytes * tokens / decode / bandwidth,
        }
    return found


def table(rows: list[dict], names: list[str], what: str) -> str:
    """Return a Markdown table of `what` (prefill or decode), one line for each context."""
    lines = [f"| {what}, tok/s | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for found in rows:
        cells = []
        for name in names:
            side = found[name]
            text = f"{side[what]:.1f}" if side[what] < 100 else f"{side[what]:.0f}"
            if name != names[0]:
                text += f" ({side[f'{what}_factor']:.1f}×)"
                if what == "decode":
                    text += f", read {side['read_share']:.0%}"
            cells.append(text)
        lines.append(f"| {found['context']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", default="64,512,2048")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    contexts = [int(text) for text in arguments.contexts.split(",")]
    sides = [Side("transformers", Transformers(arguments.checkpoint, clock).run)]
    engines = []
    for folder in arguments.engines:
        llm, side = open_engine(folder, arguments.threads, max(contexts) + arguments.tokens, clock)
        engines.append(llm)
        sides.append(side)
    array = torch.ones(_READ_BYTES // 4)
    rows = []
    for context in contexts:
        bandwidth = compare(sides, context, arguments.tokens, arguments.rounds, array, clock)
        rows.append(row(sides, context, arguments.tokens, bandwidth))
        print(json.dumps(rows[-1]), flush=True)
    for llm in engines:
        llm.close()
    names = [side.name for side in sides]
    bandwidth = statistics.median(found["read_bytes_per_s"] for found in rows)
    needs = ", ".join(f"{side.name} {side.step_bytes / 1e6:.0f}" for side in sides if side.step_bytes is not None)
    print(f"\n{table(rows, names, 'decode')}\n\n{table(rows, names, 'prefill')}\n")
    kind = "processor" if arguments.cpu_time else "wall"
    print(
        f"{kind} seconds, {arguments.threads} threads, {arguments.rounds} rounds of {arguments.tokens} tokens, "
        f"{time.strftime('%Y-%m-%d')}; memory reads {bandwidth / 1e9:.1f} GB/s; MB of weights a step: {needs}"
    )


if __name__ == "__main__":
    main()
