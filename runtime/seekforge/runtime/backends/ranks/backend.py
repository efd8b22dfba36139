"""Runs engines of several ranks: this process is rank 0, and every call is one that all ranks make.

What is above a backend - scheduling, sampling, drafts - knows nothing of ranks. What they decide comes down as steps.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from seekforge.common.cores import physical_cores
from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.runtime.backends.base import GraphMetrics, OnLoad
from seekforge.runtime.backends.ranks.collectives import Collectives
from seekforge.runtime.backends.ranks.host import Host, launched, meet
from seekforge.runtime.backends.ranks.message import Message
from seekforge.runtime.backends.ranks.micro_batches import num_parts
from seekforge.runtime.backends.ranks.network import Network
from seekforge.runtime.backends.ranks.opening import OpenRank, open_rank, settings_of
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory
from seekforge.runtime.backends.ranks.worker import message_of, work, work_across
from seekforge.runtime.backends.tensorrt.waiting import SilentGpuError

T = TypeVar("T")


class RankOutputs(dict[str, np.ndarray]):
    """Outputs of one step, by name."""

    def fetch(self, name: str) -> np.ndarray:
        """Return one output. It must have been named when the step was run."""
        return self[name]


class RanksBackend:
    """Rank 0 of an engine, with the processes of the others. A step that fails on one rank ends all of them."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        checkpoint: Path | None = None,
        progress: OnLoad | None = None,
    ) -> None:
        """Start the ranks and open their parts; see `BackendFactory`. `threads` are those of one rank.

        In a process that a launcher made another rank than 0 this does not return: it works as that rank until rank 0
        closes the engine, and then ends the process.
        """
        place = launched()
        if place is not None and place.rank > 0:
            if place.across is not None:
                work_across(place.across, place.rank, folder)
            else:
                with meet(place) as connection:
                    work(connection)
            sys.exit(0)
        assert manifest.ranks is not None
        parallelism = manifest.ranks.parallelism
        self._pp, self._tp = parallelism.pp, parallelism.tp
        self._closed = False
        threads = threads or max(physical_cores() // parallelism.num_ranks, 1)
        settings = settings_of(manifest, threads=threads, checkpoint=checkpoint)
        self._rank: OpenRank | None = None
        self._memory = None if place is not None and place.across is not None else Memory(parallelism)
        try:
            self._host = Host(
                folder,
                self._memory,
                parallelism=parallelism,
                digest=manifest.digest,
                settings=settings,
                on_fault=self._abort,
            )
        except BaseException:
            self._close_memory()
            raise
        try:
            self._collectives: Collectives = (
                Network(parallelism, 0, self._host.links, self._host.check)
                if self._memory is None
                else SharedMemory(self._memory, 0, self._host.check)
            )
            self._rank = open_rank(folder, manifest, 0, self._collectives, settings, progress, self._host.check)
            self._host.await_ready()
        except BaseException:
            self._host.fail("the engine was not opened")
            self._close_rank()
            self._close_memory()
            raise

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks on every rank; earlier ones are given back."""
        self._call(Message({"call": "allocate_caches", "num_blocks": num_blocks}))
        self._opened.allocate_caches(num_blocks)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> RankOutputs:
        """Run one step; see `Backend.run`."""
        names = sorted(outputs)
        parts = num_parts(inputs, self._pp) if graph == MODEL else 1
        self._call(message_of(inputs, names, graph, parts))
        results = self._together(lambda: self._opened.run(inputs, names, graph, parts))
        self._host.check()  # of sums that were ended for a lost rank nothing is right
        return RankOutputs(results)

    def cache(self, name: str) -> np.ndarray:
        """Return a copy of one layer's cache, such as `latent_cache.3`; for parity checks."""
        self._call(Message({"call": "cache", "name": name}))
        values = [self._opened.cache(name)]
        for stage in range(1, self._pp):
            message = self._together(lambda at=stage: self._collectives.send(None, source=at * self._tp, target=0))
            values.append(message.arrays.get("cache"))
        return next(value for value in values if value is not None)

    def graph_metrics(self) -> GraphMetrics:
        """Return what became of CUDA graphs on rank 0; the others capture the same steps."""
        return self._opened.graph_metrics()

    @property
    def fault(self) -> str | None:
        """Why no step can be run any more, when all other ranks have ended; None: one can."""
        return self._host.ended()

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Swap weights on every rank; see `Backend`. What is wrong with them is said before a rank changes any."""
        self._opened.check_update(tensors)
        self._call(Message({"call": "update_weights"}, dict(tensors)))
        self._together(lambda: self._opened.update_weights(tensors))

    def close(self) -> None:
        """End the ranks and give back what they share."""
        if self._closed:
            return
        self._closed = True
        self._host.let_leave()
        if self._host.fault is None:
            with contextlib.suppress(EngineError):  # a rank is lost now, and will not take it
                self._collectives.broadcast(Message({"call": "close"}))
        self._close_rank()  # with the others, which were told: some things are given back together
        self._host.close()
        self._collectives.close()

    @property
    def _opened(self) -> OpenRank:
        assert self._rank is not None
        return self._rank

    def _close_memory(self) -> None:
        if self._memory is not None:
            self._memory.close()

    def _close_rank(self) -> None:
        """Give back what this process has as a rank."""
        if self._rank is not None:
            with contextlib.suppress(EngineError):  # of a device whose step was ended for a lost rank
                self._rank.close()

    def _abort(self) -> None:
        """End what this process waits for: a rank is lost. What is wrong with that is not why the engine ends."""
        if self._rank is not None:
            with contextlib.suppress(EngineError):
                self._rank.abort()

    def _call(self, message: Message) -> None:
        """Tell the ranks what to do."""
        if self._closed:
            raise EngineError("the engine is closed")
        self._host.check()
        self._together(lambda: self._collectives.broadcast(message))

    def _together(self, work: Callable[[], T]) -> T:
        """Do this rank's part of what all do. Whatever keeps it from the end leaves the others waiting: they end."""
        try:
            return work()
        except BaseException as error:
            lost = self._host.fault
            if lost is None and isinstance(error, SilentGpuError):
                lost = f"rank 0: {error}"
            self._host.fail(lost or f"rank 0 left a step ({type(error).__name__})")
            if lost is not None and isinstance(error, Exception):  # what broke here broke because of that
                raise EngineError(lost) from None
            raise
