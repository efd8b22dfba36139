"""What speculation gives where every draft comes true, and where none does: a script, not a test.

    python -m tests.benchmarks.draft_speed ENGINE [--rounds 5]

A checkpoint with random weights accepts no draft, so drafts are made to agree: the MTP module runs as ever, and what it
drafted is replaced by the text that is known to come. Steps of two tokens sum in another order than steps of one, which
changes greedy text where two tokens are nearly as likely, so a text is looked for that comes out with its own drafts.
The other case is left as it is, with the switch that ends drafting which does not pay. With and without by turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence as Rows
from pathlib import Path

import numpy as np

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.engine.iteration import Row
from seekforge.runtime.engine.model_input import ModelInput
from seekforge.runtime.engine.speculative import Speculator

_PROMPT, _TOKENS, _MOST_PROMPTS, _MOST_TRIES = 60, 160, 20, 12


class Agreeing:
    """Drafts of one prompt that are what is known to come.

    Attributes:
        text: the tokens to come; empty leaves drafts as they are.
    """

    def __init__(self, llm: LLM) -> None:
        speculator = llm._core.speculator
        assert speculator is not None
        self.text: tuple[int, ...] = ()
        self._speculator, self._propose = speculator, speculator.propose
        speculator.propose = self.propose  # pyright: ignore[reportAttributeAccessIssue]

    def propose(self, group: Rows[Row], packed: ModelInput, hidden: np.ndarray) -> None:
        """Let the module draft, and put the known tokens in place of its drafts."""
        self._propose(group, packed, hidden)
        for row in group:
            known, count = len(row.sequence.output_ids), len(row.sequence.drafts)
            row.sequence.drafts = list(self.text[known : known + count]) or row.sequence.drafts

    def share(self) -> tuple[int, int]:
        """Return drafts so far, and how many came true."""
        metrics: Speculator = self._speculator
        return sum(metrics.metrics.proposed), sum(metrics.metrics.accepted)


def turn(llm: LLM, prompt: list[int]) -> tuple[tuple[int, ...], float]:
    """Return the text of a prompt and tokens a second behind its first token."""
    llm.reset_prefix_cache()
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=_TOKENS, ignore_eos=True))
    return output.outputs[0].token_ids, output.metrics.decode_tokens / output.metrics.decode_s


def own_text(plain: LLM, drafted: LLM, drafts: Agreeing, vocab_size: int) -> list[int]:
    """Return a prompt whose text comes out with its own drafts, which are set.

    Raises:
        EngineError: none of the prompts that were tried has one.
    """
    for seed in range(_MOST_PROMPTS):
        prompt = np.random.default_rng(seed).integers(2, vocab_size, _PROMPT).tolist()
        drafts.text, _ = turn(plain, prompt)
        for _ in range(_MOST_TRIES):
            text, _ = turn(drafted, prompt)
            if text == drafts.text:
                return prompt
            drafts.text = text
    raise EngineError(f"of {_MOST_PROMPTS} prompts none has a text that comes out with its own drafts")


def measure(engine: Path, *, agree: bool, threads: int, rounds: int) -> str:
    """Return the row of one case."""
    vocab_size = load_manifest(engine).vocab_size
    with (
        LLM(engine, threads=threads, num_blocks=40) as plain,
        LLM(
            engine, threads=threads, num_blocks=40, num_speculative_tokens=1, speculation_off_switch=not agree
        ) as drafted,
    ):
        drafts = Agreeing(drafted)
        prompt = np.random.default_rng(0).integers(2, vocab_size, _PROMPT).tolist()
        if agree:
            prompt = own_text(plain, drafted, drafts, vocab_size)
        else:
            turn(drafted, prompt)  # in which drafting is switched off
        before = drafts.share()
        pairs = [(turn(plain, prompt)[1], turn(drafted, prompt)[1]) for _ in range(rounds)]
        proposed, accepted = (now - then for now, then in zip(drafts.share(), before, strict=True))
    factors = [with_drafts / without for without, with_drafts in pairs]
    speeds = [statistics.median(one) for one in zip(*pairs, strict=True)]
    case = f"all agree ({accepted} of {proposed})" if agree else f"as they are ({accepted} of {proposed})"
    return (
        f"| {engine.name} | {case} | {speeds[0]:.1f} | {speeds[1]:.1f} | "
        f"{statistics.median(factors):.2f}× ({min(factors):.2f}–{max(factors):.2f}) |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print("| engine | drafts | tok/s without | with one draft | factor |\n|---|---|---|---|---|")
    for engine in given.engines:
        for agree in (True, False):
            print(measure(engine, agree=agree, threads=given.threads, rounds=given.rounds), flush=True)


if __name__ == "__main__":
    main()
