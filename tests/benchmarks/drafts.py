"""How often drafts or company change greedy text: the measured side of what docs/runtime.md promises.

Each prompt is answered alone without drafts, alone with drafts, and in a batch. A product of several rows sums in
another order than a product of one; with FP8 rounding or integer weights the last bit of a sum can flip a rounding, and
where two tokens are nearly as likely the other one may be chosen. From there on the texts are two valid ones. The gap
printed is that of the two tokens' log-probabilities in the first run, at the first place where the texts differ.

    python -m tests.benchmarks.drafts ENGINE [ENGINE ...] --prompts 40 --max-tokens 64
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.engine.outputs import CompletionOutput

#: Most likely tokens whose log-probabilities are kept, to find the other text's choice among them.
_TOP = 20


@dataclass(frozen=True)
class Difference:
    """The first place where two texts of one prompt differ.

    Attributes:
        prompt: its number.
        position: number of the generated token.
        gap: log-probability of the token of the text without drafts, less that of the other's; infinite if the other
            is not among the 20 most likely.
    """

    prompt: int
    position: int
    gap: float


def random_prompts(count: int, *, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of 4 to 40 random token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab_size, rng.integers(4, 41)).tolist() for _ in range(count)]


def generate(
    engine: Path | str,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    drafts: int = 0,
    batch: int = 1,
    deterministic: bool = False,
) -> list[CompletionOutput]:
    """Return the greedy completion of each prompt, with `batch` of them on their way at a time."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=_TOP)
    with LLM(
        engine,
        max_batch_size=batch,
        num_speculative_tokens=drafts,
        speculation_off_switch=False,
        prefix_caching=False,
        self_check=False,
        deterministic=deterministic,
    ) as llm:
        return [output.outputs[0] for output in llm.generate(prompts, params)]


def differences(plain: list[CompletionOutput], others: list[CompletionOutput]) -> list[Difference]:
    """Return the first difference of each prompt's two completions, of those that differ."""
    found = []
    for prompt, (one, other) in enumerate(zip(plain, others, strict=True)):
        position = next((i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids)) if a != b), None)
        if position is not None:
            assert one.logprobs is not None
            entry = one.logprobs[position]
            gap = entry.logprob - dict(entry.top).get(other.token_ids[position], -np.inf)
            found.append(Difference(prompt, position, float(gap)))
    return found


def main() -> None:
    """Measure, and print a line per engine and way of running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", metavar="ENGINE")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=400, help="prompts are drawn from ids below it")
    parser.add_argument("--deterministic", action="store_true")
    given = parser.parse_args()
    prompts = random_prompts(given.prompts, vocab_size=given.vocab_size)
    ways = {"1 draft": {"drafts": 1}, "3 drafts": {"drafts": 3}, "a batch of 8": {"batch": 8}}
    for engine in given.engines:
        options = {"max_tokens": given.max_tokens, "deterministic": given.deterministic}
        plain = generate(engine, prompts, **options)
        for name, way in ways.items():
            found = differences(plain, generate(engine, prompts, **options, **way))
            # a text counts up to where it parts: what comes after answers another text
            parted = {one.prompt: one.position + 1 for one in found}
            compared = sum(parted.get(i, given.max_tokens) for i in range(len(prompts)))
            gaps = sorted(one.gap for one in found)
            print(
                f"{engine}: {name}: {len(found)} of {len(prompts)} texts differ, "
                f"{1000 * len(found) / compared:.1f} of 1,000 tokens"
                + (f"; gap median {gaps[len(gaps) // 2]:.2g}, largest {gaps[-1]:.2g}" if gaps else "")
            )


if __name__ == "__main__":
    main()
