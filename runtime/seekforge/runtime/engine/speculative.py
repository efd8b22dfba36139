"""Drafting with the MTP module (spec §6): guesses for the next tokens, which the next step verifies.

The module reads (h_i, t_{i+1}) and predicts t_{i+2}; further drafts feed its own hidden state and draft back. A draft
is drawn by the same rules and with the same draw as the token it stands for, and it counts if it equals the
token that the model chooses there. So for the same logits and seed, what is generated is what would be without drafts,
token for token: the exactness of rejection sampling needs no argument, and like distributions give like tokens. Whether
a step of several queries has the very logits of a step of one is the backend's matter (docs/runtime.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np

from seekforge.formats.step_io import MTP, PAD_SLOT, StepInputs
from seekforge.runtime.backends.base import Backend
from seekforge.runtime.engine.iteration import Row
from seekforge.runtime.engine.model_input import ModelInput
from seekforge.runtime.sampling.inverse_cdf import SamplingMetadata
from seekforge.runtime.sampling.sampler import FullLogits, TopLogits, choose
from seekforge.runtime.sequence import Sequence

MAX_DRAFTS = 5


@dataclass
class SpeculationMetrics:
    """What drafts were worth.

    Attributes:
        proposed, accepted: [k], by position of the draft.
    """

    proposed: list[int]
    accepted: list[int]

    def count(self, proposed: int, accepted: int) -> None:
        """Take one verified row."""
        for depth in range(proposed):
            self.proposed[depth] += 1
            self.accepted[depth] += depth < accepted


class Speculator:
    """Runs the MTP graph after each step of the model. Its cache has the block tables of the model."""

    def __init__(self, backend: Backend, num_drafts: int, block_size: int, vocab_size: int) -> None:
        assert 1 <= num_drafts <= MAX_DRAFTS
        self.backend = backend
        self.num_drafts = num_drafts
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.metrics = SpeculationMetrics([0] * num_drafts, [0] * num_drafts)

    def propose(self, group: Rows[Row], packed: ModelInput, hidden: np.ndarray) -> None:
        """Bring the MTP cache up to date with a step, and set the drafts of the sequences that go on decoding.

        Args:
            group: rows of the step; sampled tokens have been appended to their sequences.
            packed: their layout.
            hidden: [B, Q, H] of the model, post final norm.
        """
        # those that ended just now too: others may find their blocks
        chosen = [i for i, row in enumerate(group) if row.sequence.speculates and row.sequence.state == "running"]
        if not chosen:
            return
        rows = [group[i] for i in chosen]
        step = packed.inputs
        input_ids = np.zeros((len(rows), step.input_ids.shape[1]), np.int64)
        slots = step.slot_mapping[chosen].copy()
        last: list[int] = []
        for index, row in enumerate(rows):
            count = (row.sequence.num_tokens - 1 if row.samples else row.stop) - row.start
            input_ids[index, :count] = row.sequence.tokens(row.start + 1, row.start + 1 + count)
            slots[index, count:] = PAD_SLOT
            last.append(count - 1)
        drafting = [
            i
            for i, row in enumerate(rows)
            if row.samples and row.sequence.finish_reason is None and self._most(row.sequence) > 0
        ]
        width = input_ids.shape[1]
        index = np.array([i * width + last[i] for i in drafting] or [0], np.int64)
        inputs = StepInputs(input_ids, step.positions[chosen], slots, step.block_table[chosen], index, hidden[chosen])
        results = self.backend.run(
            inputs, outputs={*TopLogits.OUTPUTS, "hidden"} if drafting else {"hidden"}, graph=MTP
        )
        if not drafting:
            return
        table = inputs.block_table[drafting]
        state = results.fetch("hidden")[drafting, [last[i] for i in drafting]]
        sequences = [rows[i].sequence for i in drafting]
        rules = SamplingMetadata.of([s.params for s in sequences], [s.seed for s in sequences])
        position = np.array([s.num_tokens - 1 for s in sequences])
        for sequence in sequences:
            sequence.drafts = []
        alive = np.arange(len(sequences))
        for depth in range(self.num_drafts):
            top = TopLogits.of(results, self.vocab_size)
            drawn = np.array([len(sequences[i].output_ids) + depth for i in alive])
            # An MTP row that is not finite, or not decided by its top logits, ends its drafts: nothing depends on them.
            full = FullLogits(functools.partial(_only_top, top), np.arange(len(alive)))
            tokens = choose(rules.take(alive), drawn, None, top, full)
            good = np.isfinite(top.logsumexp)
            for i, token, finite in zip(alive.tolist(), tokens.tolist(), good.tolist()):
                if finite:
                    sequences[i].drafts.append(token)
            going = good & np.array(
                [
                    depth + 1 < self._most(sequences[i]) and self._fits(sequences[i], depth, table.shape[1])
                    for i in alive
                ],
                bool,
            )
            if depth + 1 == self.num_drafts or not going.any():
                return
            state, tokens, alive = state[going], tokens[going], alive[going]
            at = position[alive] + depth
            reach = table[alive]
            slots = reach[np.arange(len(alive)), at // self.block_size].astype(np.int64) * self.block_size
            inputs = StepInputs(
                tokens[:, None],
                at[:, None],
                (slots + at % self.block_size)[:, None],
                reach,
                np.arange(len(alive)),
                state[:, None],
            )
            results = self.backend.run(inputs, outputs={*TopLogits.OUTPUTS, "hidden"}, graph=MTP)
            state = results.fetch("hidden")[:, 0]

    def _most(self, sequence: Sequence) -> int:
        """Drafts that could be accepted: one token is sampled after them."""
        return min(self.num_drafts, sequence.max_tokens - len(sequence.output_ids) - 1)

    def _fits(self, sequence: Sequence, depth: int, num_blocks: int) -> bool:
        """Whether the entry that the next draft writes lies in the sequence's blocks, as far as the step knows them."""
        return sequence.num_tokens - 1 + depth < min(len(sequence.table.blocks), num_blocks) * self.block_size


def _only_top(top: TopLogits) -> np.ndarray:
    """Stand in for full logits: everything outside the top K is impossible."""
    rows = np.full((len(top.ids), top.vocab_size), -np.inf, np.float32)
    np.put_along_axis(rows, top.ids.astype(np.int64), np.nan_to_num(top.logits), axis=1)
    return rows


@dataclass
class _Cost:
    """Running means of one batch size: seconds of a step, and tokens that it gives a sequence."""

    plain_s: float | None = None
    drafted_s: float | None = None
    tokens: float = 1.0
    steps: int = 0


@dataclass
class SpeculationSwitch:
    """Decides whether drafting pays, by what steps took with and without it at about the same batch size.

    Pure: it is told times and measures none. Every `probe_every` steps one runs without drafts, to know what that
    costs. When drafting costs more per token than it brings, it is off for `rest` steps, then tried anew.

    Attributes:
        probe_every, rest: numbers of decode steps.
        margin: how many times dearer drafting must be to be switched off.
    """

    probe_every: int = 32
    rest: int = 2000
    margin: float = 1.05
    _costs: dict[int, _Cost] = field(default_factory=dict)
    _off_until: int = 0
    _steps: int = 0

    @property
    def on(self) -> bool:
        """Whether sequences that start now should be drafted for."""
        return self._steps >= self._off_until

    def probes(self, num_sequences: int) -> bool:
        """Whether the next decode step of so many sequences should verify nothing."""
        cost = self._costs.get(num_sequences.bit_length())
        return cost is not None and cost.steps % self.probe_every == self.probe_every - 1

    def record(self, num_sequences: int, *, model_s: float, draft_s: float, num_tokens: int, verified: bool) -> bool:
        """Take one decode step.

        Args:
            num_sequences: rows of the step.
            model_s: time of the model's step, sampling included.
            draft_s: time of the drafts after it.
            num_tokens: tokens that it gave.
            verified: whether it had drafts to verify.

        Returns:
            Whether drafting is to stop now.
        """
        self._steps += 1
        cost = self._costs.setdefault(num_sequences.bit_length(), _Cost())
        cost.steps += 1
        if verified:
            cost.drafted_s = _blend(cost.drafted_s, model_s + draft_s)
            cost.tokens = _blend(cost.tokens, num_tokens / num_sequences)
        else:
            cost.plain_s = _blend(cost.plain_s, model_s)
        if cost.plain_s is None or cost.drafted_s is None or cost.steps < 2 * self.probe_every or not self.on:
            return False
        if cost.drafted_s / cost.tokens <= self.margin * cost.plain_s:
            return False
        self._off_until = self._steps + self.rest
        self._costs.clear()
        return True


def _blend(old: float | None, new: float) -> float:
    return new if old is None else 0.9 * old + 0.1 * new
