"""Which elements of which checkpoint tensors recipes read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from seekforge.common.errors import ProgramError
from seekforge.formats.weight_recipes.recipe import Recipe


@dataclass(frozen=True)
class _Box:
    """A part of a checkpoint tensor: a rectangle in some view of it."""

    view: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    def size(self) -> int:
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))

    def overlaps(self, other: _Box) -> bool:
        pairs = zip(self.start, self.stop, other.start, other.stop, strict=True)
        return all(a < d and c < b for a, b, c, d in pairs)


def _leaves(recipe: Recipe) -> Iterator[tuple[str, _Box]]:
    """Yield (tensor, part of it that is read) for every `take` below `recipe`."""
    if recipe.op == "take":
        assert recipe.tensor is not None
        yield recipe.tensor, _Box(recipe.shape, (0,) * len(recipe.shape), recipe.shape)
    elif recipe.op == "slice":
        assert recipe.axis is not None and recipe.start is not None
        assert recipe.stop is not None
        part = recipe.parts[0]
        for tensor, box in _leaves(part):
            if box.view == part.shape:
                start, stop = list(box.start), list(box.stop)
                start[recipe.axis] = max(start[recipe.axis], recipe.start)
                stop[recipe.axis] = min(stop[recipe.axis], recipe.stop)
                yield tensor, _Box(box.view, tuple(start), tuple(stop))
            else:  # such as a scale under a sliced dequantize: read whole, shared by the slices
                yield tensor, box
    elif recipe.op == "reshape":
        for tensor, box in _leaves(recipe.parts[0]):
            whole = box.size() == math.prod(box.view)
            if whole and math.prod(box.view) == math.prod(recipe.shape):
                yield tensor, _Box(recipe.shape, (0,) * len(recipe.shape), recipe.shape)
            else:
                yield tensor, box
    else:
        for part in recipe.parts:
            yield from _leaves(part)


def tensors_of(recipe: Recipe) -> set[str]:
    """Return the names of the checkpoint tensors that `recipe` reads."""
    return {tensor for tensor, _ in _leaves(recipe)}


@dataclass(frozen=True)
class Coverage:
    """What the recipes of a program read of a checkpoint.

    Attributes:
        used: elements read, by tensor; a part read twice counts once.
        shared: tensors of which a part is read by more than one input, and by which inputs.
    """

    used: dict[str, int]
    shared: dict[str, list[str]]


def coverage(recipes: Mapping[str, Recipe]) -> Coverage:
    """Account for every checkpoint element that `recipes` (input name -> recipe) read.

    A split counts with all its ranks: together they read the whole of it, each element once.
    """
    boxes: dict[str, dict[_Box, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, recipe in recipes.items():
        for tensor, box in _leaves(recipe):
            boxes[tensor][box].append(name)
    used: dict[str, int] = {}
    shared: dict[str, list[str]] = {}
    for tensor, parts in boxes.items():
        distinct = list(parts)
        users = sorted({_weight_of(name, recipes) for names in parts.values() for name in names})
        clash = any(a.view != b.view or a.overlaps(b) for i, a in enumerate(distinct) for b in distinct[i + 1 :])
        if clash:
            full = math.prod(distinct[0].view)
            if max(box.size() for box in distinct) < full:
                raise ProgramError(
                    f"bindings: {tensor} is read in overlapping parts by {', '.join(users)}; "
                    "parts must be equal or apart"
                )
            used[tensor] = full
        else:
            used[tensor] = sum(box.size() for box in distinct)
        if len(users) > 1 and (clash or any(len(set(names)) > 1 for names in parts.values())):
            shared[tensor] = users
    return Coverage(used, shared)


def _weight_of(name: str, inputs: Collection[str]) -> str:
    """Return the weight whose scales an input holds, or itself: both may be made of one tensor."""
    weight = name.removesuffix("_scale")
    return weight if weight in inputs else name
