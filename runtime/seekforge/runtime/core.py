"""The loop that serves requests: schedule, pack, run, sample, commit. No text and no threads."""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows

import numpy as np

from seekforge.plugins.errors import EngineError
from seekforge.runtime.backends.base import Backend
from seekforge.runtime.batch import pack
from seekforge.runtime.sampler import Draw, TopLogits, needs_full_logits, sample
from seekforge.runtime.scheduler import Row, Scheduler
from seekforge.runtime.sequence import Sequence


class Core:
    """Runs the requests of a scheduler on a backend whose caches are allocated."""

    def __init__(self, backend: Backend, scheduler: Scheduler, vocab_size: int) -> None:
        self.backend = backend
        self.scheduler = scheduler
        self.vocab_size = vocab_size

    def step(self) -> list[Sequence]:
        """Run one iteration.

        Returns:
            The sequences that got a token, each exactly one; those that ended have a `finish_reason`.

        Raises:
            EngineError: the engine gave results that are not finite.
        """
        advanced: list[Sequence] = []
        for group in self.scheduler.schedule().groups:
            started = time.monotonic()
            for row in group:
                row.sequence.started_s = row.sequence.started_s or started
            sampling = [row for row in group if row.samples]
            tokens = self._run(group, sampling)
            ended = time.monotonic()
            for row in sampling:
                row.sequence.first_token_s = row.sequence.first_token_s or ended
                row.sequence.last_token_s = ended
            self.scheduler.commit(group, {r.sequence.request_id: t for r, t in zip(sampling, tokens)})
            advanced += [row.sequence for row in sampling]
        return advanced

    def _run(self, group: Rows[Row], sampling: Rows[Row]) -> list[int]:
        """Run one rectangle and choose a token for each of its rows that samples."""
        wanted = {"top_logits", "top_ids", "logsumexp"} if sampling else set()
        if any(needs_full_logits(row.sequence.params) for row in sampling):
            wanted.add("logits")
        results = self.backend.run(pack(group, self.scheduler.block_size), outputs=wanted)
        if not sampling:
            return []
        top = TopLogits(
            results.fetch("top_logits"), results.fetch("top_ids"), results.fetch("logsumexp"), self.vocab_size
        )
        finite = np.isfinite(top.logsumexp)
        if not finite.all():
            row = sampling[int(np.flatnonzero(~finite)[0])]
            raise EngineError(
                f"the logits of request {row.sequence.request_id} at position {row.stop - 1} have logsumexp "
                f"{top.logsumexp[~finite][0]}, expected a finite number; check the engine with --verify"
            )
        draws = [Draw(s.params, s.seed, len(s.output_ids), s.banned_ids()) for s in (row.sequence for row in sampling)]
        return sample(draws, top, lambda: results.fetch("logits"))
