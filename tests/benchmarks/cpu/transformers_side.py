"""transformers' FP32 model of the same checkpoint, as a side of a comparison."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks.cpu.protocol import Clock, serve
from tests.support.oracle import load_oracle


class TransformersSide:
    """Caches of held prompts are copied before each turn, which adds to the copy."""

    def __init__(self, options: dict[str, Any], clock: Clock) -> None:
        self.clock = clock
        torch.set_num_threads(options["threads"])
        self.model = load_oracle(Path(options["folder"]), attention=options["attention"])
        self.cache: Any = None
        self.first: Any = None

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        """Return the seconds to the first token of a prompt."""
        began = self.clock()
        self.run([prompt])
        return self.clock() - began

    @torch.inference_mode()
    def hold(self, prompts: list[list[int]]) -> None:
        """Run prompts of one length, which `decode` goes on with."""
        self.cache, self.first = self.run(prompts)

    @torch.inference_mode()
    def decode(self, steps: int) -> float:
        """Return the seconds of `steps` steps, each of one token of every prompt."""
        cache, token = copy.deepcopy(self.cache), self.first
        began = self.clock()
        for _ in range(steps):
            token = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return self.clock() - began

    def run(self, prompts: list[list[int]]) -> tuple[Any, torch.Tensor]:
        """Run prompts; return their cache and their first tokens, [B, 1] int64."""
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1:].argmax(-1)


def make(options: dict[str, Any], clock: Clock) -> dict[str, Any]:
    side = TransformersSide(options, clock)
    return {"prefill": side.prefill, "hold": side.hold, "decode": side.decode}


if __name__ == "__main__":
    serve(make)
