"""Threads take jobs until every buffer is full."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import CheckpointError, ProgramError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.loader.jobs import READ_BYTES, Copy, Dequantize, Quantize
from seekforge.formats.loader.planner import Planner
from seekforge.formats.loader.progress import LoadProgress, LoadReport
from seekforge.formats.loader.reader import Reader
from seekforge.formats.loader.scan_memory import ScanMemory
from seekforge.formats.value_check import Findings
from seekforge.formats.weight_digests import WeightDigests
from seekforge.formats.weight_recipes import Recipe, evaluate, rope_rows, tensors_of

#: Bytes that all threads together may hold beside the buffers.
EXTRA_BYTES: Final = 64 << 20
_PROGRESS_EVERY_S: Final = 0.1


def allocate(recipes: Mapping[str, Recipe]) -> dict[str, np.ndarray]:
    """Return an uninitialized buffer for every input of `recipes`."""
    return {name: np.empty(recipe.shape, NUMPY[recipe.dtype]) for name, recipe in recipes.items()}


class Loader:
    """Loads a set of weight inputs; after an error, `run` again goes on with what is missing.

    Args:
        checkpoint: the checkpoint that holds the weights.
        recipes: input name -> recipe; of one rank (`weight_recipes.for_rank`).
        buffers: input name -> writable array of the recipe's shape and dtype.
        threads: parallel readers.
        scan: check values while they are read (spec §2.6).
        memory: file that remembers which checkpoints were scanned, so that it is done once; None: always scan.
        copies: unused tensor -> tensor that it must equal (the MTP layer's embedding and head). They are read, and
            compared, where values are scanned and the other one is loaded.
        digests: what the tensors must be; compared while they are read.

    Raises:
        ProgramError: a buffer does not fit its recipe, or the bindings do not fit the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipes: Mapping[str, Recipe],
        buffers: Mapping[str, np.ndarray],
        *,
        threads: int = 2,
        scan: bool = False,
        memory: Path | None = None,
        copies: Mapping[str, str] | None = None,
        digests: WeightDigests | None = None,
    ) -> None:
        self._checkpoint, self._threads, self._digests = checkpoint, threads, digests
        planner = Planner(checkpoint)
        for name, recipe in recipes.items():
            buffer = buffers[name]
            if buffer.shape != recipe.shape or buffer.dtype != NUMPY[recipe.dtype]:
                raise ProgramError(
                    f"buffer of {name} is {list(buffer.shape)} {buffer.dtype}, expected {list(recipe.shape)} "
                    f"{recipe.dtype}"
                )
            planner.add(recipe, buffer)
        self._memory = None if memory is None or not scan else ScanMemory(memory, checkpoint)
        self._scanned_before = scan and self._memory is not None and self._memory.knows(recipes)
        self._scans = scan and not self._scanned_before
        self._recipes = recipes
        self._jobs = planner.jobs(copies or {} if self._scans else {})
        self._computed = planner.computed
        self._left = set(range(len(self._jobs)))
        self._findings = Findings()
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}

    @property
    def total_bytes(self) -> int:
        """Checkpoint bytes that are needed, each counted once."""
        return sum(job.num_bytes for job in self._jobs)

    @property
    def shard_bytes(self) -> dict[str, int]:
        """How many of them come from each shard: which rank loads what."""
        result: dict[str, int] = defaultdict(int)
        for job in self._jobs:
            if isinstance(job, Copy | Quantize):
                result[self._checkpoint.info(job.tensor).shard] += job.num_bytes
            elif isinstance(job, Dequantize):
                result[self._checkpoint.info(job.weight).shard] += job.weight_bytes
                result[self._checkpoint.info(job.scale).shard] += job.num_bytes - job.weight_bytes
            else:
                for name in tensors_of(job.recipe):
                    result[self._checkpoint.info(name).shard] += self._checkpoint.info(name).num_bytes
        return dict(sorted(result.items()))

    def run(self, progress: Callable[[LoadProgress], None] | None = None) -> LoadReport:
        """Read everything that is not yet in its buffer.

        Args:
            progress: called ten times a second, and at the end.

        Raises:
            CheckpointError: a shard cannot be read, is not what it was when it was opened, or holds values that no
                checkpoint may hold. Mend it and call `run` again: what was read stays read.
        """
        start = time.perf_counter()
        total = self.total_bytes
        before = total - sum(self._jobs[i].num_bytes for i in self._left)
        done, told, stop = before, start, threading.Event()

        def work(queue: Iterator[int]) -> None:
            nonlocal done, told
            findings = self._findings if self._scans else None
            reader = Reader(self._checkpoint, self._file, findings, scratch_bytes, self._digests)
            while not stop.is_set():
                with self._lock:
                    number = next(queue, None)
                if number is None:
                    return
                try:
                    reader.do(self._jobs[number])
                except BaseException:
                    stop.set()
                    raise
                with self._lock:
                    self._left.discard(number)
                    done += self._jobs[number].num_bytes
                    now = time.perf_counter()
                    if progress is not None and (now - told >= _PROGRESS_EVERY_S or not self._left):
                        told = now
                        progress(LoadProgress(done, total, now - start))

        # a thread holds its scratch, and as much again of what it makes from it
        scratch_bytes = min(EXTRA_BYTES // self._threads // 2, READ_BYTES)
        checks = {i for i in self._left if isinstance(job := self._jobs[i], Copy) and job.check}
        try:
            for recipe, target in self._computed:
                _compute(recipe, target)
            with ThreadPoolExecutor(self._threads, "loader") as pool:
                # values are compared with buffers that must be full: first all reads, then all checks
                for numbers in (self._left - checks, checks):
                    queue = iter(sorted(numbers))
                    running = [pool.submit(work, queue) for _ in range(self._threads)]
                    try:
                        for future in running:
                            future.result()
                    except BaseException:  # an interrupt reaches this thread alone
                        stop.set()
                        raise
        finally:
            for file in self._files.values():
                os.close(file)
            self._files.clear()
        if self._scans and self._memory is not None:
            self._memory.remember(self._recipes)
        seconds = time.perf_counter() - start
        return LoadReport(total, done - before, seconds, self._scans or self._scanned_before, self._findings.families())

    def _file(self, shard: str) -> int:
        """Return an open file of a shard, which is still as long as when the checkpoint was opened.

        Raises:
            CheckpointError: it is gone or has another size.
        """
        with self._lock:
            if shard in self._files:
                return self._files[shard]
            path = self._checkpoint.folder / shard
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is it still there?") from None
            self._files[shard] = file
            num_bytes, expected = os.fstat(file).st_size, self._checkpoint.shards[shard]
            if num_bytes != expected:
                raise CheckpointError(
                    f"{path}: is now {num_bytes} bytes, was {expected} when opened; do not write to a checkpoint in use"
                )
            return file


def _compute(recipe: Recipe, target: np.ndarray) -> None:
    """Fill a computed table; the large ones by rows."""
    if recipe.tensor not in ("rope_cos", "rope_sin"):
        target[...] = evaluate(recipe, _NoTensors())
        return
    step = 1 << 13
    for start in range(0, recipe.shape[0], step):
        stop = min(start + step, recipe.shape[0])
        target[start:stop] = rope_rows(recipe, start, stop)


class _NoTensors:
    def tensor(self, name: str) -> np.ndarray:
        raise AssertionError(name)
