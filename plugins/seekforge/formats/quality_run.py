"""What a quality check asks of an engine's process, and what that answers: tokens alone, no text and no tasks.

Tokens are made of text by whoever asks, and text of tokens, so that every engine and PyTorch are given the same ones.
"""

from __future__ import annotations

from typing import Annotated, Final

from seekforge.common.records import Positive, Record, Size, at_least, finite

#: File of an answer, beside one npz file for each row whose selections were asked for.
ANSWER: Final = "answer.json"


def selections_file(row: int) -> str:
    """Return the name of the file with what was chosen in a row: `topk_indices.3` -> [positions, index_topk] int32."""
    return f"selections-{row}.npz"


class RunRow(Record):
    """Tokens that an engine is given.

    Attributes:
        ids: the tokens.
        max_tokens: most tokens to generate greedily; 0: predict `ids` one by one instead.
    """

    ids: tuple[Size, ...]
    max_tokens: Size


class RunRequest(Record):
    """What is measured of one engine.

    Attributes:
        rows: what it is given.
        selections: numbers of the rows of which the keys are kept that indexers chose.
        num_speculative_tokens: drafts of the runs with drafts; 0: there are none.
        timed: numbers of the rows that are run one at a time to measure speed.
        rounds: how often they are, with drafts and without by turns.
        threads: CPU threads for one operator; None: the cores this process may use.
        checkpoint: where the weights are, of an engine that holds none; None: where they were at build.
    """

    rows: tuple[RunRow, ...]
    selections: tuple[Size, ...] = ()
    num_speculative_tokens: Annotated[int, at_least(0, 5)] = 0
    timed: tuple[Size, ...] = ()
    rounds: Size = 0
    threads: Positive | None = None
    checkpoint: str | None = None


class DraftsRun(Record):
    """What drafts were worth.

    Attributes:
        num_speculative_tokens: drafts of a step.
        proposed, accepted: numbers of drafts, by position.
        tokens_per_step: tokens that a step with drafts gave a sequence, in the mean.
        speedup: tokens per second with drafts over those without, median of rounds; None where it was not measured.
    """

    num_speculative_tokens: Positive
    proposed: tuple[Size, ...]
    accepted: tuple[Size, ...]
    tokens_per_step: Annotated[float, finite]
    speedup: Annotated[float, finite] | None

    @property
    def acceptance(self) -> float | None:
        """Accepted part of the first drafts; None where there was none."""
        return self.accepted[0] / self.proposed[0] if self.proposed[0] else None


class SpeedRun(Record):
    """Tokens per second of one sequence at a time, without drafts: medians of rounds."""

    prefill_tok_s: Annotated[float, finite]
    decode_tok_s: Annotated[float, finite]


class RunAnswer(Record):
    """What an engine made of its rows.

    Attributes:
        completions: the generated tokens of each row; empty for one that was predicted.
        nll_sums: sum of the negative log-likelihoods of a predicted row's tokens but the first, in nats; else None.
        drafts, speed: None where they were not asked for.
    """

    completions: tuple[tuple[Size, ...], ...]
    nll_sums: tuple[Annotated[float, finite] | None, ...]
    drafts: DraftsRun | None = None
    speed: SpeedRun | None = None
