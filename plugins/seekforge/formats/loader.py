"""Fill weight inputs from a checkpoint: any set of them, each byte read once, straight into the caller's buffers.

Recipes become jobs: a run of checkpoint bytes and the places it goes to. Jobs are sorted by file and offset and
dealt to reader threads. What lies in one piece on both sides is read into the buffer itself; the rest goes through a
small scratch per thread, so the extra memory is bounded whatever the model.

Shards are read by calls and not through a mapping: the pages of a mapping count as our memory, and a shard that
shrinks while it is read would end the process with SIGBUS, where a call says that bytes are missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY, is_stored_as, itemsize, widen
from seekforge.common.errors import CheckpointError, ProgramError
from seekforge.common.files import write_json
from seekforge.common.reading import read_json
from seekforge.common.system import read_at
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine import verified
from seekforge.formats.value_check import SCALE_SUFFIX, Family, Findings, check_scales, first_fault
from seekforge.formats.weight_digests import WeightDigests
from seekforge.formats.weight_recipes import FP8_VALUES, Recipe, cast, evaluate, rope_rows, rounds_once, slice_, stack

#: Bytes that all threads together may hold beside the buffers.
EXTRA_BYTES: Final = 64 << 20
#: A job is at most about this long: what a thread takes at once, and what is read again after a failure.
_JOB_BYTES: Final = 32 << 20
#: Read at once, and scanned at once (small enough to be scanned from the cache).
_READ_BYTES, _SCAN_BYTES = 8 << 20, 1 << 19
#: Shorter runs than this are read together with what lies between them, then picked out.
_MIN_RUN_BYTES: Final = 16 << 10
_BLOCK: Final = 128
_PROGRESS_EVERY_S: Final = 0.1


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is."""

    done_bytes: int
    total_bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Mean speed so far, in 10^9 bytes of checkpoint per second."""
        return self.done_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float:
        """Seconds left at the mean speed."""
        left = self.total_bytes - self.done_bytes
        return left / self.done_bytes * self.seconds if self.done_bytes else float("inf")


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        num_bytes: checkpoint bytes that were needed; `read_bytes` of them in this run, the rest in one that failed.
        seconds: the time of this run.
        scanned: values were checked: now, or in an earlier load of the same files.
        families: kind of weight -> its scales, as far as they were read (spec §2.6); empty without a scan.
    """

    num_bytes: int
    read_bytes: int
    seconds: float
    scanned: bool
    families: dict[str, Family] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes of checkpoint per second."""
        return self.read_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


def allocate(recipes: Mapping[str, Recipe]) -> dict[str, np.ndarray]:
    """Return an uninitialized buffer for every input of `recipes`."""
    return {name: np.empty(recipe.shape, NUMPY[recipe.dtype]) for name, recipe in recipes.items()}


# --- jobs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """Some elements of a checkpoint tensor: offset and strides in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> _View:
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        return _View(0, shape, tuple(reversed(strides)))

    def slice(self, axis: int, start: int, stop: int) -> _View:
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return _View(self.offset + start * self.strides[axis], shape, self.strides)

    def transpose(self, perm: Sequence[int]) -> _View:
        return _View(self.offset, tuple(self.shape[p] for p in perm), tuple(self.strides[p] for p in perm))

    def reshape(self, shape: tuple[int, ...]) -> _View | None:
        """Return the view with another shape, or None if it is not one of the same memory."""
        # strides of a one-byte array that is never read
        fake = np.lib.stride_tricks.as_strided(np.empty(1, np.int8), self.shape, self.strides)
        try:
            seen = np.reshape(fake, shape, copy=False)
        except ValueError:
            return None
        return _View(self.offset, shape, seen.strides)

    @property
    def span(self) -> int:
        """Elements from the first to the last, gaps included."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_dense(self) -> bool:
        """Whether it is one run of memory, in order."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


@dataclass(frozen=True)
class _Copy:
    """Elements of one tensor and the places they go to; `check` compares with the first place instead."""

    tensor: str
    dtype: str
    view: _View
    targets: tuple[np.ndarray, ...]
    check: bool = False

    @property
    def num_bytes(self) -> int:
        return self.view.size * itemsize(self.dtype)


@dataclass(frozen=True)
class _Dequantize:
    """Rows of one FP8 matrix times its block scales, and the parts of the product that go to places.

    Every view has the same first axis with the same stride.
    """

    weight: str
    scale: str
    scale_dtype: str
    shape: tuple[int, int]
    views: tuple[_View, ...]
    targets: tuple[np.ndarray, ...]

    @property
    def rows(self) -> tuple[int, int]:
        """The rows that are needed."""
        first = min(view.offset for view in self.views) // self.shape[1]
        last = max(view.offset + view.span - 1 for view in self.views) // self.shape[1]
        return first, last + 1

    @property
    def weight_bytes(self) -> int:
        first, last = self.rows
        return (last - first) * self.shape[1]

    @property
    def num_bytes(self) -> int:
        first, last = self.rows
        blocks = (last - 1) // _BLOCK + 1 - first // _BLOCK
        return self.weight_bytes + itemsize(self.scale_dtype) * blocks * -(-self.shape[1] // _BLOCK)


@dataclass(frozen=True)
class _Whole:
    """A recipe of a form that has no faster way: evaluated from whole tensors (its operands are held meanwhile)."""

    recipe: Recipe
    target: np.ndarray
    num_bytes: int


_Job = _Copy | _Dequantize | _Whole


class _Planner:
    """Turns recipes and buffers into jobs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._copies: dict[tuple[str, _View], list[np.ndarray]] = defaultdict(list)
        self._products: dict[tuple[str, str], list[tuple[_View, np.ndarray]]] = defaultdict(list)
        self._jobs: list[_Job] = []
        self.computed: list[tuple[Recipe, np.ndarray]] = []

    def add(self, recipe: Recipe, target: np.ndarray) -> None:
        """Plan `recipe` into `target`, which has its shape; another dtype rounds."""
        if recipe.op == "stack":
            for part, row in zip(recipe.parts, target, strict=True):
                self.add(part, row)
        elif recipe.op == "concat":
            assert recipe.axis is not None
            start = 0
            for part in recipe.parts:
                stop = start + part.shape[recipe.axis]
                self.add(part, target[(*[slice(None)] * recipe.axis, slice(start, stop))])
                start = stop
        elif recipe.op == "transpose":
            assert recipe.perm is not None
            self.add(recipe.parts[0], target.transpose(np.argsort(recipe.perm)))
        elif recipe.op == "bytes":
            self.add(recipe.parts[0], target.view(NUMPY["f8e4m3"]))
        elif recipe.op == "cast" and rounds_once(recipe):
            self.add(recipe.parts[0], target)
        elif recipe.op == "computed":
            self.computed.append((recipe, target))
        else:
            self._add_view(recipe, target)

    def _add_view(self, recipe: Recipe, target: np.ndarray) -> None:
        pushed = _push_slice(recipe)
        if pushed is not None:
            self.add(pushed, target)
            return
        found = _as_view(recipe)
        if found is None:
            from_tensors = sum(self._checkpoint.info(name).num_bytes for name in _tensors(recipe))
            self._jobs.append(_Whole(recipe, target, from_tensors))
            return
        base, view = found
        if base.op == "take":
            assert base.tensor is not None
            self._check(base)
            self._copies[base.tensor, view].append(target)
        else:
            for part in base.parts:
                self._check(part)
            weight, scale = (part.tensor for part in base.parts)
            assert weight is not None and scale is not None
            # products are formed in f32 and rounded by the buffer's dtype: that of the recipe does not matter here
            self._products[weight, scale].append((view, target))

    def _check(self, leaf: Recipe) -> None:
        """Compare a `take` with what the checkpoint has; a narrower type of the same values will do."""
        assert leaf.tensor is not None
        info = self._checkpoint.info(leaf.tensor)
        if info.shape != leaf.shape or not is_stored_as(info.dtype, leaf.dtype):
            raise ProgramError(
                f"bindings expect {leaf.tensor} as {list(leaf.shape)} {leaf.dtype}, the checkpoint has "
                f"{list(info.shape)} {info.dtype}; pass the checkpoint that the program was exported from"
            )

    def jobs(self, copies: Mapping[str, str]) -> list[_Job]:
        """Return the jobs in the order of shards and bytes; those that compare come last.

        Args:
            copies: tensor that nothing reads -> the tensor it must equal; compared where that is read whole.
        """
        result = list(self._jobs)
        checks: list[_Job] = []
        mains = {main: copy for copy, main in copies.items() if copy in self._checkpoint}
        for (tensor, view), targets in self._copies.items():
            dtype = self._checkpoint.info(tensor).dtype
            result += _pieces(_Copy(tensor, dtype, view, tuple(targets)))
            if tensor in mains and view.size == self._checkpoint.info(tensor).num_bytes // itemsize(dtype):
                checks += _pieces(_Copy(mains[tensor], dtype, view, (targets[0],), check=True))
        for (weight, scale), uses in self._products.items():
            result += self._dequantize(weight, scale, uses)
        place = self._place
        return [*sorted(result, key=place), *sorted(checks, key=place)]

    def _dequantize(self, weight: str, scale: str, uses: list[tuple[_View, np.ndarray]]) -> Iterator[_Job]:
        rows, columns = self._checkpoint.info(weight).shape
        grouped: dict[tuple[int, int], list[tuple[_View, np.ndarray]]] = defaultdict(list)
        for view, target in uses:
            grouped[view.shape[0], view.strides[0]].append((view, target))
        for (length, stride), group in grouped.items():
            # f32 products and the values looked up take 8 bytes for each byte read
            step = max(1, _READ_BYTES // 8 // max(stride, 1))
            for start in range(0, length, step):
                stop = min(start + step, length)
                yield _Dequantize(
                    weight,
                    scale,
                    self._checkpoint.info(scale).dtype,
                    (rows, columns),
                    tuple(view.slice(0, start, stop) for view, _ in group),
                    tuple(target[start:stop] for _, target in group),
                )

    def _place(self, job: _Job) -> tuple[str, int]:
        if isinstance(job, _Whole):
            return "", 0
        name, offset = (job.tensor, job.view.offset) if isinstance(job, _Copy) else (job.weight, job.rows[0])
        info = self._checkpoint.info(name)
        return info.shard, info.begin + offset * itemsize(info.dtype)


def _push_slice(recipe: Recipe) -> Recipe | None:
    """Move a slice below a cast, concat or stack; None for everything else."""
    if recipe.op != "slice" or recipe.parts[0].op not in ("cast", "concat", "stack"):
        return None
    whole = recipe.parts[0]
    assert recipe.axis is not None and recipe.start is not None and recipe.stop is not None
    if whole.op == "cast":
        return cast(slice_(whole.parts[0], recipe.axis, recipe.start, recipe.stop), whole.dtype)
    if whole.op == "stack":
        if recipe.axis == 0:
            return stack(whole.parts[recipe.start : recipe.stop])
        return stack(slice_(part, recipe.axis - 1, recipe.start, recipe.stop) for part in whole.parts)
    if whole.axis != recipe.axis:
        parts = tuple(slice_(part, recipe.axis, recipe.start, recipe.stop) for part in whole.parts)
        return Recipe("concat", recipe.shape, recipe.dtype, parts, axis=whole.axis)
    parts, start = [], 0
    for part in whole.parts:
        stop = start + part.shape[recipe.axis]
        low, high = max(recipe.start, start), min(recipe.stop, stop)
        if low < high:
            parts.append(slice_(part, recipe.axis, low - start, high - start))
        start = stop
    return Recipe("concat", recipe.shape, recipe.dtype, tuple(parts), axis=recipe.axis)


def _as_view(recipe: Recipe) -> tuple[Recipe, _View] | None:
    """Return the `take` or `dequantize` (of two whole matrices) below `recipe`, and what is seen of it."""
    if recipe.op == "take":
        return recipe, _View.whole(recipe.shape)
    if recipe.op == "dequantize":
        plain = all(part.op == "take" for part in recipe.parts) and len(recipe.shape) == 2
        return (recipe, _View.whole(recipe.shape)) if plain else None
    if recipe.op not in ("slice", "reshape", "transpose"):
        return None
    inner = _as_view(recipe.parts[0])
    if inner is None:
        return None
    base, view = inner
    if recipe.op == "slice":
        assert recipe.axis is not None and recipe.start is not None and recipe.stop is not None
        return base, view.slice(recipe.axis, recipe.start, recipe.stop)
    if recipe.op == "transpose":
        assert recipe.perm is not None
        return base, view.transpose(recipe.perm)
    seen = view.reshape(recipe.shape)
    return None if seen is None else (base, seen)


def _tensors(recipe: Recipe) -> Iterator[str]:
    if recipe.op == "take":
        assert recipe.tensor is not None
        yield recipe.tensor
    for part in recipe.parts:
        yield from _tensors(part)


def _pieces(job: _Copy) -> Iterator[_Copy]:
    """Cut a job along its first axis into pieces of about `_JOB_BYTES`."""
    if not job.view.shape or job.num_bytes <= _JOB_BYTES:
        yield job
        return
    length = job.view.shape[0]
    step = max(1, _JOB_BYTES // (job.num_bytes // length))
    for start in range(0, length, step):
        stop = min(start + step, length)
        targets = tuple(target[start:stop] for target in job.targets)
        yield _Copy(job.tensor, job.dtype, job.view.slice(0, start, stop), targets, job.check)


# --- the loader -----------------------------------------------------------------------------------------------


class Loader:
    """Loads a set of weight inputs; after an error, `run` again goes on with what is missing.

    Args:
        checkpoint: the checkpoint that holds the weights.
        recipes: input name -> recipe; of one rank (`bindings.for_rank`).
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
        planner = _Planner(checkpoint)
        for name, recipe in recipes.items():
            buffer = buffers[name]
            if buffer.shape != recipe.shape or buffer.dtype != NUMPY[recipe.dtype]:
                raise ProgramError(
                    f"buffer of {name} is {list(buffer.shape)} {buffer.dtype}, expected {list(recipe.shape)} "
                    f"{recipe.dtype}"
                )
            planner.add(recipe, buffer)
        self._memory = None if memory is None or not scan else _ScanMemory(memory, checkpoint)
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
            if isinstance(job, _Copy):
                result[self._checkpoint.info(job.tensor).shard] += job.num_bytes
            elif isinstance(job, _Dequantize):
                result[self._checkpoint.info(job.weight).shard] += job.weight_bytes
                result[self._checkpoint.info(job.scale).shard] += job.num_bytes - job.weight_bytes
            else:
                for name in _tensors(job.recipe):
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
            reader = _Reader(self._checkpoint, self._file, findings, scratch_bytes, self._digests)
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
        scratch_bytes = min(EXTRA_BYTES // self._threads // 2, _READ_BYTES)
        checks = {i for i in self._left if isinstance(job := self._jobs[i], _Copy) and job.check}
        try:
            for recipe, target in self._computed:
                _compute(recipe, target)
            with ThreadPoolExecutor(self._threads, "loader") as pool:
                # values are compared with buffers that must be full: first all reads, then all checks
                for numbers in (self._left - checks, checks):
                    queue = iter(sorted(numbers))
                    running = [pool.submit(work, queue) for _ in range(self._threads)]
                    for future in running:
                        future.result()
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


class _Reader:
    """Does jobs, one at a time, with one scratch."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        file: Callable[[str], int],
        findings: Findings | None,
        scratch_bytes: int,
        digests: WeightDigests | None = None,
    ) -> None:
        self._checkpoint, self._file, self._findings, self._digests = checkpoint, file, findings, digests
        self._scratch = np.empty(scratch_bytes, np.uint8)
        self._words = np.empty(_SCAN_BYTES // 8, np.uint64)

    def do(self, job: _Job) -> None:
        """Read what `job` needs and put it where it belongs."""
        if isinstance(job, _Copy):
            self._copy(job)
        elif isinstance(job, _Dequantize):
            self._dequantize(job)
        else:
            job.target[...] = evaluate(job.recipe, self)

    def tensor(self, name: str) -> np.ndarray:
        """Return a whole tensor in memory of its own."""
        info = self._checkpoint.info(name)
        array = np.empty(info.shape, NUMPY[info.dtype])
        self._read(name, info.dtype, 0, _bytes_of(array))
        return array

    def _copy(self, job: _Copy) -> None:
        first = job.targets[0]
        direct = job.view.is_dense and first.flags.c_contiguous and first.dtype == NUMPY[job.dtype] and not job.check
        if direct and job.view.size:
            self._read(job.tensor, job.dtype, job.view.offset, _bytes_of(first))
            for other in job.targets[1:]:
                other[...] = first
        elif job.view.size:
            self._through_scratch(job.tensor, job.dtype, job.view, job.targets, check=job.check)

    def _through_scratch(
        self, tensor: str, dtype: str, view: _View, targets: tuple[np.ndarray, ...], *, check: bool
    ) -> None:
        """Read pieces of `view` that fit the scratch, gaps included, and assign or compare what was asked for."""
        size = itemsize(dtype)
        rows = 1
        if view.shape:
            inner = view.slice(0, 0, 1)
            apart = inner.is_dense and inner.size * size >= _MIN_RUN_BYTES and inner.size != view.strides[0]
            if inner.span * size > self._scratch.size or (apart and view.shape[0] > 1):
                for i in range(view.shape[0]):
                    part = _View(view.offset + i * view.strides[0], view.shape[1:], view.strides[1:])
                    self._copy(_Copy(tensor, dtype, part, tuple(target[i] for target in targets), check))
                return
            spare = self._scratch.size // size - inner.span
            rows = 1 + (spare // view.strides[0] if view.strides[0] else view.shape[0])
        for start in range(0, view.shape[0] if view.shape else 1, rows):
            part = view.slice(0, start, min(start + rows, view.shape[0])) if view.shape else view
            raw = self._scratch[: part.span * size]
            self._read(tensor, dtype, part.offset, raw, scan=part.is_dense)
            strides = tuple(stride * size for stride in part.strides)
            values = np.lib.stride_tricks.as_strided(raw.view(NUMPY[dtype]), part.shape, strides)
            if not part.is_dense and self._findings is not None:
                self._scan(tensor, dtype, _bytes_of(np.ascontiguousarray(values)), part)
            for target in targets:
                place = target[start : start + rows] if view.shape else target
                if not check:
                    place[...] = values
                elif not np.array_equal(place, values.astype(place.dtype)):
                    raise CheckpointError(
                        f"{self._where(tensor)} differs from the tensor that the main model has in its place, expected "
                        "equal bits (the MTP layer shares it); the checkpoint was changed on one side only, download "
                        "it again"
                    )

    def _dequantize(self, job: _Dequantize) -> None:
        (first, last), k = job.rows, job.shape[1]
        columns = -(-k // _BLOCK)
        low, high = first // _BLOCK, (last - 1) // _BLOCK + 1
        held = np.empty((high - low, columns), NUMPY[job.scale_dtype])
        self._read(job.scale, job.scale_dtype, low * columns, _bytes_of(held))
        scales = widen(held, "f32")
        stored = np.empty((last - first, k), np.uint8)
        self._read(job.weight, "f8e4m3", first * k, stored.reshape(-1))
        product = FP8_VALUES[stored]
        along_k = np.repeat(scales, _BLOCK, axis=1)[:, :k]
        for row in range(low, high):
            part = slice(max(row * _BLOCK, first) - first, min((row + 1) * _BLOCK, last) - first)
            product[part] *= along_k[row - low]
        flat = product.reshape(-1)
        for view, target in zip(job.views, job.targets, strict=True):
            strides = tuple(4 * stride for stride in view.strides)
            target[...] = np.lib.stride_tricks.as_strided(flat[view.offset - first * k :], view.shape, strides)

    def _read(self, tensor: str, dtype: str, offset: int, out: np.ndarray, *, scan: bool = True) -> None:
        """Fill `out` (bytes) from element `offset` of a tensor on, checking values on the way."""
        info = self._checkpoint.info(tensor)
        file = self._file(info.shard)
        position = info.begin + offset * itemsize(dtype)
        scan = scan and self._findings is not None
        # what is scanned is read in small pieces, which are then still in the cache
        step = _SCAN_BYTES if scan else _READ_BYTES
        for start in range(0, out.size, step):
            piece = out[start : start + step]
            self._fill(tensor, file, position + start, piece)
            if scan:
                first = offset + start // itemsize(dtype)
                self._scan(tensor, dtype, piece, _View(first, (piece.size // itemsize(dtype),), (1,)))
        if self._digests is not None:
            damage = self._digests.compare(
                tensor,
                info.num_bytes,
                position - info.begin,
                out,
                lambda begin, rest: self._fill(tensor, file, info.begin + begin, rest),
            )
            if damage is not None:
                raise CheckpointError(
                    f"{self._where(tensor)}: its bytes {damage[0]:,} to {damage[1] - 1:,} (from byte {info.begin:,} of "
                    "the file on) are not those that the engine was built with: the file is damaged, download it "
                    "again; or these are other weights, build the engine with them"
                )

    def _fill(self, tensor: str, file: int, position: int, out: np.ndarray) -> None:
        """Fill `out` from a byte of a file on."""
        filled = 0
        while filled < out.size:
            try:
                count = read_at(file, out[filled:].data, position + filled)
            except OSError as error:
                raise CheckpointError(
                    f"{self._where(tensor)} cannot be read ({error.strerror}); check the disk, then go on"
                ) from None
            if count == 0:
                raise CheckpointError(
                    f"{self._where(tensor)} ends {out.size - filled} bytes early: the file shrank while it "
                    "was read; put the whole file back, then go on"
                )
            filled += count

    def _scan(self, tensor: str, dtype: str, values: np.ndarray, view: _View) -> None:
        """Check values, the bytes of what `view` sees of a tensor, one after the other."""
        assert self._findings is not None
        fault = first_fault(values, dtype, self._words)
        if fault is not None:
            value = float(values.view(NUMPY[dtype])[fault])
            place = np.unravel_index(fault, view.shape)
            element = view.offset + sum(int(i) * stride for i, stride in zip(place, view.strides, strict=True))
            raise CheckpointError(
                f"{self._where(tensor)} holds {value} at element {element}, expected finite values; "
                "the file is damaged, download it again"
            )
        if tensor.endswith(SCALE_SUFFIX):
            scales = values.view(NUMPY[dtype]).astype(np.float32, copy=False)
            check_scales(scales, self._where(tensor))
            self._findings.add(tensor, scales)

    def _where(self, tensor: str) -> str:
        return f"{self._checkpoint.folder / self._checkpoint.info(tensor).shard}: {tensor!r}"


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """Return the bytes of a contiguous array, as a view."""
    return array.reshape(-1).view(np.uint8)


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


class _ScanMemory:
    """A JSON file of what was scanned: digest of index and files as they are -> digests of the sets of recipes."""

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self._path = path
        digest = hashlib.sha256(checkpoint.index_digest().encode())
        whose = [verified.identity(checkpoint.folder / shard) for shard in sorted(checkpoint.shards)]
        digest.update(json.dumps(whose).encode())
        self._key = None if None in whose else digest.hexdigest()

    def knows(self, recipes: Mapping[str, Recipe]) -> bool:
        """Whether these very bytes were scanned before and found good."""
        return self._key is not None and _digest(recipes) in self._load().get(self._key, [])

    def remember(self, recipes: Mapping[str, Recipe]) -> None:
        """Note that they are good; a file that cannot be written only costs another scan."""
        if self._key is None:  # written just now
            return
        known = self._load()
        known[self._key] = sorted({*known.get(self._key, []), _digest(recipes)})
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, known)

    def _load(self) -> dict[str, list[str]]:
        try:
            raw = read_json(self._path)
        except (OSError, ValueError):
            return {}
        good = isinstance(raw, dict) and all(isinstance(value, list) for value in raw.values())
        return raw if good else {}


def _digest(recipes: Mapping[str, Recipe]) -> str:
    """Return a digest of what a set of recipes reads."""
    digest = hashlib.sha256()
    for name in sorted(recipes):
        digest.update(json.dumps([name, recipes[name].to_dict()]).encode())
    return digest.hexdigest()
