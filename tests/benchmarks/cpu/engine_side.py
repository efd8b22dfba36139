"""An engine of ours through `LLM`, as a side of a comparison."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.cpu.protocol import Clock, serve

from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.engine.core import StepMetrics


def greedy(count: int) -> SamplingParams:
    """Return the parameters of `count` tokens, whatever they are."""
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


class EngineSide:
    """Prompts that were held are found in the prefix cache, so that a turn decodes and does little else."""

    def __init__(self, options: dict[str, Any], clock: Clock) -> None:
        self.clock = clock
        self.prompts: list[list[int]] = []
        self.steps: list[tuple[float, StepMetrics]] = []
        self.llm = LLM(
            options["folder"],
            threads=options["threads"],
            max_batch_size=options["batch"],
            num_blocks=options["tokens"] // 64 + 8 * options["batch"] + 8,
            on_step=lambda metrics: self.steps.append((clock(), metrics)),
        )

    def prefill(self, prompt: list[int]) -> float:
        """Return the seconds to the first token of a prompt that was not seen before."""
        self.llm.reset_prefix_cache()
        began = self.clock()
        self.llm.generate([prompt], greedy(1))
        return self.clock() - began

    def hold(self, prompts: list[list[int]]) -> None:
        """Run prompts, which `decode` goes on with."""
        self.llm.reset_prefix_cache()
        self.prompts = prompts
        self.llm.generate(prompts, greedy(1))

    def decode(self, steps: int) -> float:
        """Return the seconds of `steps` steps, each of one token of every prompt: from the end of the one before."""
        self.steps.clear()
        self.llm.generate(self.prompts, greedy(steps + 1))
        first = max(i for i, (_, metrics) in enumerate(self.steps) if metrics.num_prefill_tokens)
        batches = [metrics.num_decode_tokens for _, metrics in self.steps[first + 1 :]]
        if batches != [len(self.prompts)] * steps:
            raise RuntimeError(f"steps decoded {batches} tokens, expected {steps} of {len(self.prompts)}")
        return self.steps[-1][0] - self.steps[first][0]


def make(options: dict[str, Any], clock: Clock) -> dict[str, Any]:
    side = EngineSide(options, clock)
    return {"prefill": side.prefill, "hold": side.hold, "decode": side.decode}


if __name__ == "__main__":
    serve(make)
