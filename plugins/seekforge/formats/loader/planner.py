"""Recipes and buffers become jobs, in the order of shards and bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY, is_stored_as, itemsize
from seekforge.common.errors import ProgramError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.loader.jobs import READ_BYTES, Copy, Dequantize, Job, Quantize, Whole, pieces
from seekforge.formats.loader.views import View, as_view
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.weight_recipes import (
    Recipe,
    as_bytes,
    block_codes,
    cast,
    concat,
    nvfp4_rows,
    nvfp4_scales,
    rounds_once,
    slice_,
    stack,
    tensors_of,
)
from seekforge.formats.weight_recipes.constructors import block_scales

#: Ops below which a slice is moved, so that no more is read or computed than it has.
_SLICED_BELOW: Final = ("bytes", "cast", "concat", "stack", "block_codes", "block_scales")

#: What is made of each part of a stack or of rows by itself, so that a job holds one matrix.
_OF_EACH_PART: Final = {"nvfp4_rows": nvfp4_rows, "nvfp4_scales": nvfp4_scales}


class Planner:
    """Turns recipes and buffers into jobs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._copies: dict[tuple[str, View], list[np.ndarray]] = defaultdict(list)
        self._products: dict[tuple[str, str], list[tuple[View, np.ndarray]]] = defaultdict(list)
        self._quantized: dict[str, list[tuple[Recipe, np.ndarray]]] = defaultdict(list)
        self._jobs: list[Job] = []
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
        elif recipe.op in _OF_EACH_PART and (pushed := _push_below_parts(recipe)) is not None:
            self.add(pushed, target)
        elif recipe.op == "cast" and rounds_once(recipe):
            self.add(recipe.parts[0], target)
        elif recipe.op in ("block_codes", "block_scales") and recipe.parts[0].op == "take":
            self._check(recipe.parts[0])
            assert recipe.parts[0].tensor is not None
            self._quantized[recipe.parts[0].tensor].append((recipe, target))
        elif recipe.op == "computed":
            self.computed.append((recipe, target))
        else:
            self._add_view(recipe, target)

    def _add_view(self, recipe: Recipe, target: np.ndarray) -> None:
        pushed = _push_slice(recipe)
        if pushed is not None:
            self.add(pushed, target)
            return
        based = as_view(recipe)
        if based is None:
            from_tensors = sum(self._checkpoint.info(name).num_bytes for name in tensors_of(recipe))
            self._jobs.append(Whole(recipe, target, from_tensors))
            return
        base, view = based
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

    def jobs(self, copies: Mapping[str, str]) -> list[Job]:
        """Return the jobs in the order of shards and bytes; those that compare come last.

        Args:
            copies: tensor that nothing reads -> the tensor it must equal; compared where that is read whole.
        """
        result = list(self._jobs)
        checks: list[Job] = []
        mains = {main: copy for copy, main in copies.items() if copy in self._checkpoint}
        for (tensor, view), targets in self._copies.items():
            dtype = self._checkpoint.info(tensor).dtype
            result += pieces(Copy(tensor, dtype, view, tuple(targets)))
            if tensor in mains and view.size == self._checkpoint.info(tensor).num_bytes // itemsize(dtype):
                checks += pieces(Copy(mains[tensor], dtype, view, (targets[0],), check=True))
        for (weight, scale), uses in self._products.items():
            result += self._dequantize(weight, scale, uses)
        for tensor, made in self._quantized.items():
            result += self._quantize(tensor, made)
        place = self._place
        return [*sorted(result, key=place), *sorted(checks, key=place)]

    def _dequantize(self, weight: str, scale: str, uses: list[tuple[View, np.ndarray]]) -> Iterator[Job]:
        rows, columns = self._checkpoint.info(weight).shape
        grouped: dict[tuple[int, int], list[tuple[View, np.ndarray]]] = defaultdict(list)
        for view, target in uses:
            grouped[view.shape[0], view.strides[0]].append((view, target))
        for (length, stride), group in grouped.items():
            # f32 products and the values looked up take 8 bytes for each byte read
            step = max(1, READ_BYTES // 8 // max(stride, 1))
            for start in range(0, length, step):
                stop = min(start + step, length)
                yield Dequantize(
                    weight,
                    scale,
                    self._checkpoint.info(scale).dtype,
                    (rows, columns),
                    tuple(view.slice(0, start, stop) for view, _ in group),
                    tuple(target[start:stop] for _, target in group),
                )

    def _quantize(self, tensor: str, made: list[tuple[Recipe, np.ndarray]]) -> Iterator[Job]:
        info = self._checkpoint.info(tensor)
        rows, columns = info.shape
        # a row of blocks in f32, its magnitudes and its codes take three times what is read
        blocks = max(1, READ_BYTES // 4 // (FP8_BLOCK * max(columns, 1) * itemsize(info.dtype)))
        for start in range(0, rows, blocks * FP8_BLOCK):
            stop = min(start + blocks * FP8_BLOCK, rows)
            first, end = start // FP8_BLOCK, -(-stop // FP8_BLOCK)
            codes = tuple(target[start:stop] for recipe, target in made if recipe.op == "block_codes")
            scales = tuple(target[first:end] for recipe, target in made if recipe.op == "block_scales")
            yield Quantize(tensor, info.dtype, (rows, columns), (start, stop), codes, scales)

    def _place(self, job: Job) -> tuple[str, int]:
        if isinstance(job, Whole):
            return "", 0
        if isinstance(job, Copy):
            name, offset = job.tensor, job.view.offset
        else:
            name, offset = (job.tensor if isinstance(job, Quantize) else job.weight), job.rows[0]
        info = self._checkpoint.info(name)
        return info.shard, info.begin + offset * itemsize(info.dtype)


def _push_below_parts(recipe: Recipe) -> Recipe | None:
    """Move what is made row by row below a stack, a concat of rows, or a slice of these; None: it is above none."""
    make, whole = _OF_EACH_PART[recipe.op], recipe.parts[0]
    if whole.op == "slice":
        moved = _push_slice(whole)
        return None if moved is None else make(moved)
    if whole.op == "stack":
        return stack(map(make, whole.parts))
    if whole.op == "concat" and whole.axis != len(whole.shape) - 1:
        assert whole.axis is not None
        return concat(map(make, whole.parts), whole.axis)
    return None


def _push_slice(recipe: Recipe) -> Recipe | None:
    """Move a slice below what is made element by element or of parts, or block by block; None for everything else."""
    if recipe.op != "slice" or recipe.parts[0].op not in _SLICED_BELOW:
        return None
    whole = recipe.parts[0]
    assert recipe.axis is not None and recipe.start is not None and recipe.stop is not None
    if whole.op in ("block_codes", "block_scales"):
        make, unit = (block_codes, 1) if whole.op == "block_codes" else (block_scales, FP8_BLOCK)
        size = whole.parts[0].shape[recipe.axis]
        start, stop = recipe.start * unit, min(recipe.stop * unit, size)
        if start % FP8_BLOCK or (stop % FP8_BLOCK and stop != size):
            return None
        return make(slice_(whole.parts[0], recipe.axis, start, stop))
    if whole.op == "bytes":
        return as_bytes(slice_(whole.parts[0], recipe.axis, recipe.start, recipe.stop))
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
