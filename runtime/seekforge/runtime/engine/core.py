"""The loop that serves requests: schedule, pack, run, sample, commit. No text and no threads.

A step that fails ends the requests in it and no others; what it may have written is never found in the cache again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seekforge.formats.step_runner import StepOutputs
from seekforge.runtime.backends.base import Backend
from seekforge.runtime.engine.iteration import Iteration, Row
from seekforge.runtime.engine.model_input import InputBuilder, ModelInput
from seekforge.runtime.engine.scheduler import Scheduler
from seekforge.runtime.engine.speculative import SpeculationSwitch, Speculator
from seekforge.runtime.engine.token_sampler import TokenSampler
from seekforge.runtime.sampling.logits_processors import reason
from seekforge.runtime.sequence import Sequence


class StepMetrics(NamedTuple):
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
        on_step: called with the metrics of each iteration.
        may_draft: False lets sequences that start from now on do without drafts.
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
            backend: a backend whose caches are allocated.
            scheduler: the scheduler that says what runs.
            vocab_size: the vocabulary size of the model.
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
        self.may_draft = True
        self.on_step: Callable[[StepMetrics], None] | None = None
        self._packer = InputBuilder(scheduler.block_size, scheduler.max_batch_size)
        self._chooser = TokenSampler(vocab_size, scheduler.max_batch_size)
        if speculator is not None:
            self._chooser.on_verified = speculator.metrics.count

    @property
    def drafting(self) -> bool:
        """Whether sequences that start now are drafted for."""
        return self.may_draft and self.speculator is not None and (self.switch is None or self.switch.on)

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
            sum([row.num_tokens for row in plan.prefill]),
            sum([row.num_tokens for row in plan.decode]),
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
            faults = self._chooser.sample(group, packed, results)
            for row, fault in faults:
                self.scheduler.fail([row], fault)
            sampled = time.monotonic()
            if self.speculator is not None and hidden is not None:
                self.speculator.propose(group, packed, hidden)
                self._judge(group, is_decode, sampled - started, time.monotonic() - sampled)
            self.scheduler.commit(group)
        except Exception as error:
            return self.scheduler.fail(group, reason(error))
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

    def _model(self, group: tuple[Row, ...], packed: ModelInput) -> tuple[StepOutputs, np.ndarray | None]:
        """Run the model's graph and keep what was asked for of each token; `hidden` is for the speculator."""
        wanted = self._chooser.outputs(group, packed)
        drafting = self.speculator is not None and any(row.sequence.speculates for row in group)
        if drafting:
            wanted |= {"hidden"}
        kinds = {kind for row in group for kind in row.sequence.params.taps}
        taps = sorted({name for kind in kinds for name in self.tap_names[kind]})
        if taps:
            wanted |= {*taps}
        results = self.backend.run(packed.inputs, outputs=wanted)
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
