"""The loop that serves requests: schedule, pack, run, sample, commit. No text and no threads.

A step that fails ends the requests in it and no others; what it may have written is never found in the cache again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np

from seekforge.runtime.backends.base import Backend, StepOutputs
from seekforge.runtime.batch import Packed, Packer
from seekforge.runtime.edits import Edit, edit_for
from seekforge.runtime.logprobs import token_logprobs
from seekforge.runtime.sampler import NO_TOKEN, Rules, TopLogits, choose, needs_full_logits
from seekforge.runtime.scheduler import Iteration, Row, Scheduler
from seekforge.runtime.sequence import Sequence
from seekforge.runtime.speculative import SpeculationSwitch, Speculator


@dataclass(frozen=True)
class StepMetrics:
    """One iteration, as told to whoever listens.

    Attributes:
        seconds: it took.
        num_prefill_tokens, num_decode_tokens: computed, padding left out.
        num_sampled: tokens generated.
        num_running, num_waiting: sequences, after it.
        num_free_blocks: cache blocks that could be handed out, after it.
    """

    seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_sampled: int
    num_running: int
    num_waiting: int
    num_free_blocks: int


class Core:
    """Runs the requests of a scheduler on a backend whose caches are allocated.

    Attributes:
        on_step: told each iteration.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        vocab_size: int,
        *,
        tap_names: dict[str, tuple[str, ...]] | None = None,
        speculator: Speculator | None = None,
        switch: SpeculationSwitch | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            backend: its caches are allocated.
            scheduler: says what runs.
            vocab_size: of the model.
            tap_names: kind of tap -> names of the model's outputs.
            speculator: drafts tokens; None generates one at a time.
            switch: turns drafting off where it does not pay; None leaves it on.
        """
        self.backend = backend
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.tap_names = tap_names or {}
        self.speculator = speculator
        self.switch = switch
        self.on_step: Callable[[StepMetrics], None] | None = None
        self._packer = Packer(scheduler.block_size, scheduler.max_batch_size)
        self._rules_of: tuple[tuple[int, ...], Rules, list[int]] = ((), Rules.of((), ()), [])

    @property
    def drafting(self) -> bool:
        """Whether sequences that start now are drafted for."""
        return self.speculator is not None and (self.switch is None or self.switch.on)

    def step(self) -> list[Sequence]:
        """Run one iteration.

        Returns:
            The sequences that got tokens or ended; those that ended have a `finish_reason`.
        """
        began = time.monotonic()
        touched = self.scheduler.expire(began)
        probe = self.switch is not None and self.switch.probes(self.scheduler.num_running)
        plan = self.scheduler.schedule(verify=not probe)
        sampled = 0
        for group in plan.groups:
            before = sum([len(row.sequence.output_ids) for row in group])
            touched += self._run_group(group, is_decode=group is plan.decode)
            sampled += sum([len(row.sequence.output_ids) for row in group]) - before
        if self.on_step is not None:
            self.on_step(self._metrics(began, plan, sampled))
        return touched

    def _metrics(self, began: float, plan: Iteration, sampled: int) -> StepMetrics:
        scheduler = self.scheduler
        return StepMetrics(
            time.monotonic() - began,
            sum(row.num_tokens for row in plan.prefill),
            sum(row.num_tokens for row in plan.decode),
            sampled,
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.cache.pool.num_free,
        )

    def _run_group(self, group: tuple[Row, ...], *, is_decode: bool) -> list[Sequence]:
        """Run one rectangle; returns the sequences that got tokens or ended."""
        started = time.monotonic()
        for row in group:
            if row.sequence.started_s is None:
                row.sequence.started_s = started
        try:
            packed = self._packer.pack(group)
            results, hidden = self._model(group, packed)
            faults = self._sample(group, packed, results)
            for row, fault in faults:
                self.scheduler.fail([row], fault)
            sampled = time.monotonic()
            if self.speculator is not None and hidden is not None:
                self.speculator.propose(group, packed, hidden)
                self._judge(group, is_decode, sampled - started, time.monotonic() - sampled)
            self.scheduler.commit(group)
        except Exception as error:
            return self.scheduler.fail(group, _reason(error))
        except BaseException:  # an interrupt: nobody knows how far the step came
            self.scheduler.fail(group, "interrupted", "abort")
            raise
        ended = time.monotonic()
        for index in packed.sampling:
            sequence = group[index].sequence
            if sequence.first_token_s is None:
                sequence.first_token_s = ended
            sequence.last_token_s = ended
        failed = [row.sequence for row, _ in faults if not row.samples]
        failed += [sibling for row, _ in faults for sibling in row.sequence.siblings]
        return [group[index].sequence for index in packed.sampling] + failed

    def _model(self, group: tuple[Row, ...], packed: Packed) -> tuple[StepOutputs, np.ndarray | None]:
        """Run the model's graph and keep what was asked for of each token; `hidden` is for the speculator."""
        wanted: set[str] = set()
        if packed.sampling or packed.prompt_spans:
            wanted.update(TopLogits.OUTPUTS)
        if packed.prompt_spans or any(needs_full_logits(group[i].sequence.params) for i in packed.sampling):
            wanted.add("logits")
        drafting = self.speculator is not None and any(row.sequence.speculates for row in group)
        if drafting:
            wanted.add("hidden")
        taps = sorted({name for row in group for kind in row.sequence.params.taps for name in self.tap_names[kind]})
        results = self.backend.run(packed.inputs, outputs={*wanted, *taps})
        hidden = results.fetch("hidden") if drafting else None
        for name in taps:
            values = results.fetch(name)
            values = values.reshape(*packed.inputs.input_ids.shape, values.shape[-1])
            kind = name.partition(".")[0]
            for index, row in enumerate(group):
                if kind in row.sequence.params.taps:
                    piece = values[index, : row.num_tokens].copy()
                    row.sequence.taps.setdefault(name, []).append((row.start, piece))
        return results, hidden

    def _sample(self, group: tuple[Row, ...], packed: Packed, results: StepOutputs) -> list[tuple[Row, str]]:
        """Append a token to each row that samples, and further ones as long as drafts come true.

        Returns:
            Rows that cannot go on, with the reason.
        """
        if not packed.sampling and not packed.prompt_spans:
            return []
        top = TopLogits.of(results, self.vocab_size)
        faults: dict[int, str] = {}
        finite = np.isfinite(top.logsumexp)
        if finite.all():
            finite = None
        else:
            faults = _prompt_faults(group, packed, top.logsumexp)
        full: list[np.ndarray] = []

        def full_logits(rows: np.ndarray) -> np.ndarray:
            if not full:
                full.append(results.fetch("logits"))
            return full[0][rows]

        for index, span in packed.prompt_spans.items():
            if index not in faults:
                self._prompt_logprobs(group[index], np.arange(span.start, span.stop), top, full_logits)
        alive = [at for at, index in enumerate(packed.sampling) if index not in faults]
        if not alive:
            return [(group[i], fault) for i, fault in faults.items()]
        rows = [group[index] for index in packed.sampling]
        rules, editing = self._rules([row.sequence for row in rows])
        everything = len(alive) == len(rows) == len(packed.inputs.logits_index)
        depth = 0
        while alive:
            if finite is not None:
                alive = _drop_not_finite(alive, depth, group, packed, top.logsumexp, faults)
                everything = False
                if not alive:
                    break
            if everything and depth == 0:
                some, part = top, rules
                places = packed.first_logit
            else:
                places = packed.first_logit[alive] + depth
                some, part = top.take(places), rules.take(np.array(alive))
            sequences = [rows[at].sequence for at in alive]
            edits, broken = _edits(sequences, alive, editing)
            drawn = np.array([len(s.output_ids) for s in sequences]) if not part.all_greedy else places
            tokens = choose(part, drawn, edits, some, lambda some, places=places: full_logits(places[some]))
            for fault_at, fault in broken.items():
                faults[packed.sampling[alive[fault_at]]] = fault
            self._logprobs(sequences, tokens, some, lambda some, places=places: full_logits(places[some]))
            going: list[int] = []
            for at, sequence, token in zip(alive, sequences, tokens.tolist()):
                if token == NO_TOKEN:
                    faults.setdefault(packed.sampling[at], "every token is banned or forbidden by the grammar")
                    continue
                if packed.sampling[at] in faults:
                    continue
                try:
                    sequence.append(token)
                except Exception as error:  # the grammar's, or the listener's
                    faults[packed.sampling[at]] = _reason(error)
                    continue
                drafts = rows[at].num_drafts
                if depth < drafts and sequence.finish_reason is None and token == sequence.drafts[depth]:
                    going.append(at)
                elif drafts and self.speculator is not None:
                    accepted = depth + (depth < drafts and token == sequence.drafts[depth])
                    self.speculator.metrics.count(drafts, accepted)
            alive, depth = going, depth + 1
        for row in rows:
            row.sequence.drafts = []
        return [(group[i], fault) for i, fault in faults.items()]

    def _rules(self, sequences: Rows[Sequence]) -> tuple[Rules, list[int]]:
        """Return the rules of these rows, and which have their logits changed; kept while rows stay together."""
        key = tuple([s.request_id for s in sequences])
        if self._rules_of[0] != key:
            rules = Rules.of([s.params for s in sequences], [s.seed for s in sequences])
            self._rules_of = (key, rules, [i for i, s in enumerate(sequences) if s.params.edits_logits])
        return self._rules_of[1], self._rules_of[2]

    def _logprobs(
        self,
        sequences: Rows[Sequence],
        tokens: np.ndarray,
        top: TopLogits,
        full_logits: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Keep the log-probabilities of the tokens about to be appended, for those that want them."""
        wanting = [
            i
            for i, s in enumerate(sequences)
            if (s.params.logprobs is not None or s.params.best_of is not None) and tokens[i] != NO_TOKEN
        ]
        if not wanting:
            return
        at = np.array(wanting)
        counts = [sequences[i].params.logprobs or 0 for i in wanting]
        found = token_logprobs(tokens[at], counts, top.take(at), lambda rows: full_logits(at[rows]))
        for i, entry in zip(wanting, found, strict=True):
            sequences[i].cumulative_logprob += entry.logprob
            if sequences[i].params.logprobs is not None:
                sequences[i].logprobs.append(entry)

    def _prompt_logprobs(
        self, row: Row, places: np.ndarray, top: TopLogits, full_logits: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        sequence, count = row.sequence, len(places)
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        tokens = np.array(sequence.prompt_ids[row.start + 1 : row.start + 1 + count], np.int64)
        asked = [sequence.params.prompt_logprobs or 0] * count
        sequence.prompt_logprobs += token_logprobs(
            tokens, asked, top.take(places), lambda rows: full_logits(places[rows])
        )

    def _judge(self, group: tuple[Row, ...], is_decode: bool, model_s: float, draft_s: float) -> None:
        """Let the switch see a decode step; it may end the drafting."""
        if self.switch is None or not is_decode or not all(row.sequence.speculates for row in group):
            return
        verified = any(row.num_drafts for row in group)
        tokens = sum([row.sequence.num_tokens - (row.stop - row.num_drafts) for row in group])
        stop = self.switch.record(len(group), model_s=model_s, draft_s=draft_s, num_tokens=tokens, verified=verified)
        if stop:
            for sequence in self.scheduler.running:
                sequence.speculates = sequence.table.publishes = False
                sequence.drafts = []


def _edits(sequences: Rows[Sequence], alive: list[int], editing: list[int]) -> tuple[dict[int, Edit], dict[int, str]]:
    """Return the edits of those rows that have one, and why some have none that ought to."""
    if not editing:
        return {}, {}
    changed = set(editing)
    edits: dict[int, Edit] = {}
    broken: dict[int, str] = {}
    for i, (at, sequence) in enumerate(zip(alive, sequences, strict=True)):
        if at in changed:
            try:
                edit = edit_for(sequence)
            except Exception as error:  # the grammar's
                broken[i] = _reason(error)
            else:
                if edit is not None:
                    edits[i] = edit
    return edits, broken


def _prompt_faults(group: tuple[Row, ...], packed: Packed, logsumexp: np.ndarray) -> dict[int, str]:
    """Name the rows of which some logits of the prompt, all asked for, are not finite."""
    faults: dict[int, str] = {}
    for index, span in packed.prompt_spans.items():
        bad = np.flatnonzero(~np.isfinite(logsumexp[span.start : span.stop]))
        if len(bad):
            row = group[index]
            faults[index] = _nan_fault(row.sequence, row.start + int(bad[0]), float(logsumexp[span.start + bad[0]]))
    return faults


def _drop_not_finite(
    alive: list[int], depth: int, group: tuple[Row, ...], packed: Packed, logsumexp: np.ndarray, faults: dict[int, str]
) -> list[int]:
    """Return the rows whose next logits are finite; the others are added to `faults`."""
    good: list[int] = []
    for at in alive:
        index, value = packed.sampling[at], float(logsumexp[packed.first_logit[at] + depth])
        if np.isfinite(value):
            good.append(at)
        else:
            faults[index] = _nan_fault(
                group[index].sequence, group[index].stop - group[index].num_drafts - 1 + depth, value
            )
    return good


def _nan_fault(sequence: Sequence, position: int, value: float) -> str:
    return (
        f"the logits of request {sequence.request_id} at position {position} have logsumexp {value}, "
        "expected a finite number; check the engine with --verify"
    )


def _reason(error: Exception) -> str:
    """Return one line on what went wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
