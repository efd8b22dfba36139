"""What a request changes of its logits before it chooses: penalties, bias, bans, grammar. numpy only.

An edit can be applied to a whole row or to some of its tokens. For the second use it says how many tokens it may lower
(those outside the known ones then weigh less than they seem) and which it may raise (those must be known).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from seekforge.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Edit:
    """Changes of one row's logits, applied in this order.

    Attributes:
        repetition: factor for tokens of `seen`.
        seen: sorted ids of prompt and output; empty without a repetition penalty.
        generated: sorted ids of the output, with `penalty` to subtract from each.
        penalty: frequency_penalty · count + presence_penalty.
        bias: id -> what is added.
        banned: ids that cannot be chosen.
        allowed: [vocab_size] bool: all others cannot be chosen.
    """

    repetition: float = 1.0
    seen: np.ndarray | None = None
    generated: np.ndarray | None = None
    penalty: np.ndarray | None = None
    bias: Mapping[int, float] | None = None
    banned: frozenset[int] = frozenset()
    allowed: np.ndarray | None = None

    def apply(self, logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the changed logits of the tokens `ids`.

        Args:
            logits: [M], f64.
            ids: [M]; each token once.
        """
        logits = logits.copy()
        if self.seen is not None:
            hit, _ = _find(ids, self.seen)
            values = logits[hit]
            logits[hit] = np.where(values > 0, values / self.repetition, values * self.repetition)
        if self.generated is not None and self.penalty is not None:
            hit, at = _find(ids, self.generated)
            logits[hit] -= self.penalty[at]
        if self.bias:
            biased = np.array(sorted(self.bias), np.int64)
            hit, at = _find(ids, biased)
            logits[hit] += np.array([self.bias[token] for token in biased.tolist()])[at]
        if self.banned:
            hit, _ = _find(ids, np.array(sorted(self.banned), np.int64))
            logits[hit] = -np.inf
        if self.allowed is not None:
            logits[~self.allowed[ids]] = -np.inf
        return logits

    def num_lowered_others(self, ids: np.ndarray) -> int | None:
        """Return a bound on how many tokens that are not among `ids` become less likely; None is no bound."""
        if self.allowed is not None:
            return None
        lowered: list[np.ndarray] = [np.array(sorted(self.banned), np.int64)]
        if self.seen is not None and self.repetition > 1:
            lowered.append(self.seen)
        if self.generated is not None:
            lowered.append(self.generated)
        if self.bias:
            lowered.append(np.array(sorted(token for token, value in self.bias.items() if value < 0), np.int64))
        return sum(len(tokens) - len(_find(ids, tokens)[0]) for tokens in lowered)

    def may_raise_others(self, ids: np.ndarray) -> bool:
        """Whether this may make a token more likely that is not among `ids`."""
        raised: list[np.ndarray] = []
        if self.seen is not None and self.repetition < 1:
            raised.append(self.seen)
        if self.generated is not None and self.penalty is not None:
            raised.append(self.generated[self.penalty < 0])
        if self.bias:
            raised.append(np.array([token for token, value in self.bias.items() if value > 0], np.int64))
        return any(len(tokens) and not np.isin(tokens, ids).all() for tokens in raised)


def _find(ids: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which `ids` are in the sorted `among` (indices into ids) and where they stand there."""
    if not len(among):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    at = np.minimum(np.searchsorted(among, ids), len(among) - 1)
    hit = np.flatnonzero(among[at] == ids)
    return hit, at[hit]


def edit_for(sequence: Sequence) -> Edit | None:
    """Return what the next token's logits of `sequence` are changed by; None when nothing is."""
    params = sequence.params
    if not params.edits_logits:
        return None
    seen = generated = penalty = None
    if sequence.counts is not None:
        if params.repetition_penalty != 1:
            if sequence.distinct_prompt_ids is None:
                sequence.distinct_prompt_ids = np.unique(np.array(sequence.prompt_ids, np.int64))
            seen = np.union1d(sequence.distinct_prompt_ids, np.fromiter(sequence.counts, np.int64))
        if sequence.counts and (params.presence_penalty or params.frequency_penalty):
            generated = np.array(sorted(sequence.counts), np.int64)
            counted = np.array([sequence.counts[token] for token in generated.tolist()], np.float64)
            penalty = params.frequency_penalty * counted + params.presence_penalty
    banned = set(sequence.stop_ids) if len(sequence.output_ids) < params.min_tokens else set()
    banned |= _banned_by(sequence.bad_words, sequence.output_ids)
    allowed = sequence.grammar.allowed() if sequence.grammar is not None else None
    return Edit(
        params.repetition_penalty, seen, generated, penalty, params.logit_bias or None, frozenset(banned), allowed
    )


def _banned_by(bad_words: tuple[tuple[int, ...], ...], output_ids: list[int]) -> set[int]:
    """Return the tokens that would complete one of `bad_words`."""
    banned: set[int] = set()
    for word in bad_words:
        start = len(word) - 1
        if start == 0 or (len(output_ids) >= start and tuple(output_ids[-start:]) == word[:-1]):
            banned.add(word[-1])
    return banned
