"""Views of checkpoint tensors: offset and strides, without the bytes; and what of a recipe is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seekforge.formats.weight_recipes.recipe import Recipe


@dataclass(frozen=True)
class View:
    """Some elements of a checkpoint tensor: offset and strides in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> View:
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        return View(0, shape, tuple(reversed(strides)))

    def slice(self, axis: int, start: int, stop: int) -> View:
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return View(self.offset + start * self.strides[axis], shape, self.strides)

    def transpose(self, perm: Sequence[int]) -> View:
        return View(self.offset, tuple(self.shape[p] for p in perm), tuple(self.strides[p] for p in perm))

    def reshape(self, shape: tuple[int, ...]) -> View | None:
        """Return the view with another shape, or None if it is not one of the same memory."""
        # strides of a one-byte array that is never read
        fake = np.lib.stride_tricks.as_strided(np.empty(1, np.int8), self.shape, self.strides)
        try:
            seen = np.reshape(fake, shape, copy=False)
        except ValueError:
            return None
        return View(self.offset, shape, seen.strides)

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


def as_view(recipe: Recipe) -> tuple[Recipe, View] | None:
    """Return the `take` or `dequantize` (of two whole matrices) below `recipe`, and what is seen of it."""
    if recipe.op == "take":
        return recipe, View.whole(recipe.shape)
    if recipe.op == "dequantize":
        plain = all(part.op == "take" for part in recipe.parts) and len(recipe.shape) == 2
        return (recipe, View.whole(recipe.shape)) if plain else None
    if recipe.op not in ("slice", "reshape", "transpose"):
        return None
    inner = as_view(recipe.parts[0])
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
