"""From the logits of a step to the tokens of its sequences: rules, edits, drafts that come true, log-probabilities.

What goes wrong with one row is its fault alone, and is told to the caller in words.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np

from seekforge.formats.step_runner import StepOutputs
from seekforge.runtime.engine.iteration import Row
from seekforge.runtime.engine.model_input import ModelInput
from seekforge.runtime.sampling.inverse_cdf import SamplingMetadata
from seekforge.runtime.sampling.logits_processors import EditedRows, EditTables, reason
from seekforge.runtime.sampling.logprobs import token_logprobs
from seekforge.runtime.sampling.sampler import NO_TOKEN, FullLogits, TopLogits, choose, needs_full_logits
from seekforge.runtime.sequence import Sequence

_OUTPUTS = frozenset(TopLogits.OUTPUTS)
_WITH_LOGITS = _OUTPUTS | {"logits"}


@dataclass(frozen=True)
class _Company:
    """What is fixed about sequences that sample together, kept while they do.

    Attributes:
        key: the sequences, by which the same group is known again.
        rules: the sampling rules of all rows.
        edited: None where none changes its logits.
        scoring: those that want log-probabilities.
        thinking: those whose thoughts may have to end.
        needs_full: whether a step must keep whole logits for them.
        plain: whether the largest logit of each is all that matters.
    """

    key: tuple[int, ...]
    sequences: list[Sequence]
    rules: SamplingMetadata
    edited: EditedRows | None
    scoring: list[int]
    thinking: list[int]
    needs_full: bool
    plain: bool


class TokenSampler:
    """Chooses the tokens of a scheduler's groups. Keeps what only changes when other sequences come together.

    Attributes:
        on_verified: called for each verified row with its drafts and how many of them came true.
    """

    def __init__(self, vocab_size: int, max_batch_size: int) -> None:
        self.vocab_size = vocab_size
        self.on_verified: Callable[[int, int], None] | None = None
        self._tables = EditTables(max_batch_size, vocab_size)
        self._company: _Company | None = None
        self._packed: ModelInput | None = None  # whose rows they are: a decode step that goes on has the same

    def outputs(self, group: Rows[Row], packed: ModelInput) -> frozenset[str]:
        """Return which results of the model `sample` may look at."""
        if not packed.sampling and not packed.prompt_spans:
            return frozenset()
        needs_full = packed.prompt_spans or self._together(group, packed).needs_full
        return _WITH_LOGITS if needs_full else _OUTPUTS

    def sample(self, group: Rows[Row], packed: ModelInput, results: StepOutputs) -> list[tuple[Row, str]]:
        """Append a token to each row that samples, and further ones as long as drafts come true.

        Args:
            group: rows of the step.
            packed: their layout.
            results: the results of the model, which was asked for `outputs`.

        Returns:
            Rows that cannot go on, with the reason.
        """
        if not packed.sampling and not packed.prompt_spans:
            return []
        if not packed.prompt_spans and len(packed.inputs.logits_index) == len(packed.sampling):  # and no drafts
            company = self._together(group, packed)
            if company.plain and math.isfinite(sum(results.fetch("logsumexp").tolist())):
                return self._take_largest(company, group, packed, results)
        top = TopLogits.of(results, self.vocab_size)
        all_finite = bool(np.isfinite(top.logsumexp).all())
        faults = {} if all_finite else _prompt_faults(group, packed, top.logsumexp)
        fetch = functools.cache(lambda: results.fetch("logits"))
        for index, span in packed.prompt_spans.items():
            if index not in faults:
                _score_prompt(group[index], np.arange(span.start, span.stop), top, fetch)
        alive = [at for at, index in enumerate(packed.sampling) if index not in faults]
        company = self._together(group, packed)
        depth = 0
        while alive:
            if not all_finite:
                alive = _drop_not_finite(alive, depth, group, packed, top.logsumexp, faults)
                if not alive:
                    break
            appended = self._next(company, alive, packed, top, fetch, depth, faults)
            alive, depth = self._coming_true(group, packed, company, appended, depth), depth + 1
        for sequence in company.sequences:
            sequence.drafts = []
        return [(group[index], fault) for index, fault in faults.items()]

    def _take_largest(
        self, company: _Company, group: Rows[Row], packed: ModelInput, results: StepOutputs
    ) -> list[tuple[Row, str]]:
        """Append the token with the largest logit to each row; NumPy's calls would cost more than the choice."""
        faults: dict[int, str] = {}
        tokens = results.fetch("top_ids")[:, 0].tolist()
        _append(range(len(tokens)), company.sequences, tokens, packed, faults)
        for sequence in company.sequences:
            sequence.drafts = []
        return [(group[index], fault) for index, fault in faults.items()]

    def _together(self, group: Rows[Row], packed: ModelInput) -> _Company:
        """Return what is fixed about the rows that sample, from the step before if they are the same."""
        if self._company is not None and packed is self._packed and self._company.key[0] == self._tables.version:
            return self._company
        self._packed = packed
        sequences = [group[index].sequence for index in packed.sampling]
        key = (self._tables.version, *[s.request_id for s in sequences])
        if self._company is None or self._company.key != key:
            params = [s.params for s in sequences]
            edits = any(p.edits_logits for p in params)
            edited = EditedRows(self._tables, sequences) if edits else None
            needs_full = any(needs_full_logits(p) for p in params)
            thinking = [at for at, sequence in enumerate(sequences) if sequence.thinking is not None]
            self._company = _Company(
                (self._tables.version, *key[1:]),
                sequences,
                SamplingMetadata.of(params, [s.seed for s in sequences]),
                edited,
                [at for at, p in enumerate(params) if p.logprobs is not None or p.best_of is not None],
                thinking,
                needs_full,
                plain=not needs_full and not thinking,
            )
        return self._company

    def _next(
        self,
        company: _Company,
        alive: list[int],
        packed: ModelInput,
        top: TopLogits,
        fetch: Callable[[], np.ndarray],
        depth: int,
        faults: dict[int, str],
    ) -> list[int]:
        """Append the next token of each row of `alive`; returns those that got one."""
        rules, sequences = company.rules, company.sequences
        everything = len(alive) == len(sequences)
        if not everything:
            rules, sequences = rules.take(np.array(alive)), [sequences[at] for at in alive]
        places = (packed.first_logit if everything else packed.first_logit[alive]) + depth
        if len(alive) != len(top.ids) or depth:
            top = top.take(places)
        full = FullLogits(fetch, places)
        edits, broken = (None, {}) if company.edited is None else company.edited.next(alive)
        for index, fault in broken.items():
            faults[packed.sampling[alive[index]]] = fault
        drawn = places if rules.all_greedy else np.array([len(s.output_ids) for s in sequences])
        tokens = choose(rules, drawn, edits, top, full)
        if company.thinking:
            _end_thoughts(tokens, sequences)
        if company.scoring:
            wanted = set(company.scoring)
            scoring = [i for i, at in enumerate(alive) if at in wanted and tokens[i] != NO_TOKEN]
            _score([sequences[i] for i in scoring], np.array(scoring, np.int64), tokens, top, full)
        return _append(alive, sequences, tokens.tolist(), packed, faults)

    def _coming_true(
        self, group: Rows[Row], packed: ModelInput, company: _Company, appended: list[int], depth: int
    ) -> list[int]:
        """Return the rows whose draft number `depth` is the token they got: the token after it is known too."""
        going: list[int] = []
        if not any(row.num_drafts for row in group):
            return going
        for at in appended:
            sequence, drafts = company.sequences[at], group[packed.sampling[at]].num_drafts
            true = depth < drafts and sequence.last_id == sequence.drafts[depth]
            if true and sequence.finish_reason is None:
                going.append(at)
            elif drafts and self.on_verified is not None:
                self.on_verified(drafts, depth + true)
        return going


def _append(
    alive: Rows[int], sequences: Rows[Sequence], tokens: Rows[int], packed: ModelInput, faults: dict[int, str]
) -> list[int]:
    """Append a token to each sequence that has no fault yet; returns those of `alive` that got theirs."""
    appended: list[int] = []
    for at, sequence, token in zip(alive, sequences, tokens):
        if faults and packed.sampling[at] in faults:
            continue
        if token == NO_TOKEN:
            faults[packed.sampling[at]] = "every token is banned or forbidden by the grammar"
            continue
        try:
            sequence.append(token)
        except Exception as error:  # the grammar's, or the listener's
            faults[packed.sampling[at]] = reason(error)
        else:
            appended.append(at)
    return appended


def _end_thoughts(tokens: np.ndarray, sequences: Rows[Sequence]) -> None:
    """Put the token that ends a thought where one has to end."""
    for row, sequence in enumerate(sequences):
        forced = None if sequence.thinking is None else sequence.thinking.forced()
        if forced is not None:
            tokens[row] = forced


def _score(sequences: Rows[Sequence], at: np.ndarray, tokens: np.ndarray, top: TopLogits, full: FullLogits) -> None:
    """Keep the log-probabilities of the tokens about to be appended; `at`: which rows these sequences are."""
    counts = [sequence.params.logprobs or 0 for sequence in sequences]
    texts = [sequence.token_text for sequence in sequences]
    entries = token_logprobs(tokens[at], counts, top.take(at), full.take(at), texts)
    for sequence, entry in zip(sequences, entries, strict=True):
        sequence.cumulative_logprob += entry.logprob
        if sequence.params.logprobs is not None:
            sequence.logprobs.append(entry)


def _score_prompt(row: Row, places: np.ndarray, top: TopLogits, fetch: Callable[[], np.ndarray]) -> None:
    """Keep the log-probabilities of the prompt's tokens that follow the positions of `row`."""
    sequence, count = row.sequence, len(places)
    if not sequence.prompt_logprobs:
        sequence.prompt_logprobs.append(None)
    tokens = np.array(sequence.prompt_ids[row.start + 1 : row.start + 1 + count], np.int64)
    num_logprobs = [sequence.params.prompt_logprobs or 0] * count
    sequence.prompt_logprobs += token_logprobs(
        tokens, num_logprobs, top.take(places), FullLogits(fetch, places), [sequence.token_text] * count
    )


def _prompt_faults(group: Rows[Row], packed: ModelInput, logsumexp: np.ndarray) -> dict[int, str]:
    """Name the rows of which some logits of the prompt, all asked for, are not finite."""
    faults: dict[int, str] = {}
    for index, span in packed.prompt_spans.items():
        bad = np.flatnonzero(~np.isfinite(logsumexp[span.start : span.stop]))
        if len(bad):
            row = group[index]
            faults[index] = _nan_fault(row.sequence, row.start + int(bad[0]), float(logsumexp[span.start + bad[0]]))
    return faults


def _drop_not_finite(
    alive: list[int], depth: int, group: Rows[Row], packed: ModelInput, logsumexp: np.ndarray, faults: dict[int, str]
) -> list[int]:
    """Return the rows whose next logits are finite; the others are added to `faults`."""
    good: list[int] = []
    for at in alive:
        index, value = packed.sampling[at], float(logsumexp[packed.first_logit[at] + depth])
        if np.isfinite(value):
            good.append(at)
        else:
            row = group[index]
            faults[index] = _nan_fault(row.sequence, row.stop - row.num_drafts - 1 + depth, value)
    return good


def _nan_fault(sequence: Sequence, position: int, value: float) -> str:
    return (
        f"the logits of request {sequence.request_id} at position {position} have logsumexp {value}, "
        "expected a finite number; check the engine with --verify"
    )
