"""Decode and prefill against transformers' eager FP32 model on the same checkpoint: a script, not a test.

python tests/runtime/bench_cpu.py CHECKPOINT ENGINE [--threads 2]

The engine is of exact numerics, since transformers computes no FP8. Rounds alternate between the two, so that a busy
machine slows both; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import load_oracle, write_dequantised

from seekforge.runtime import LLM, SamplingParams


class Transformers:
    """The independent model, with its own cache."""

    def __init__(self, checkpoint: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model = load_oracle(write_dequantised(checkpoint, Path(folder) / "f32"))

    @torch.inference_mode()
    def run(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Return seconds of the prompt and of `count` decoded tokens."""
        began = time.perf_counter()
        out = self.model(torch.tensor([prompt]), use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(count):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return middle - began, time.perf_counter() - middle


def run_engine(llm: LLM, prompt: list[int], count: int) -> tuple[float, float]:
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=count + 1, ignore_eos=True))
    return output.metrics.prefill_s, output.metrics.decode_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", default="64,512,2048")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    other = Transformers(arguments.checkpoint)
    rows = []
    with LLM(arguments.engine, threads=arguments.threads, max_batch_size=1, num_blocks=60, prefix_caching=False) as llm:
        for context in map(int, arguments.contexts.split(",")):
            prompt = np.random.default_rng(context).integers(2, 1000, context).tolist()
            ours, theirs = [], []
            for _ in range(arguments.rounds):
                ours.append(run_engine(llm, prompt, arguments.tokens))
                theirs.append(other.run(prompt, arguments.tokens))
            prefill = [context / statistics.median(r[0] for r in runs) for runs in (ours, theirs)]
            decode = [arguments.tokens / statistics.median(r[1] for r in runs) for runs in (ours, theirs)]
            row = {"context": context, "prefill": prefill, "decode": decode}
            rows.append(row)
            print(
                f"context {context:5}: prefill {prefill[0]:7.1f} against {prefill[1]:7.1f} tok/s "
                f"({prefill[0] / prefill[1]:.2f}x), decode {decode[0]:6.1f} against {decode[1]:6.1f} tok/s "
                f"({decode[0] / decode[1]:.2f}x)",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
