"""Which constants of an engine change when tensors of its checkpoint do. numpy only."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import EngineError
from seekforge.common.records import shown
from seekforge.formats.weight_recipes import Recipe, tensors_of

#: Characters of a name that are looked at for a better spelling: those of a checkpoint have some 60.
_LONGEST_NAME = 200


class GivenTensors:
    """Tensors in memory, as recipes read them."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors

    def tensor(self, name: str) -> np.ndarray:
        """Return one."""
        return self._tensors[name]


def changed_constants(
    bindings: Mapping[str, Mapping[str, Recipe]], tensors: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Recipe]]:
    """Return the constants that read any of `tensors`: graph -> name -> recipe.

    Args:
        bindings: the bindings of the engine, graph -> constant -> recipe.
        tensors: checkpoint tensor -> new value.

    Raises:
        EngineError: a name is unknown, a shape or dtype is another, a value is not finite, or a constant also reads
            a tensor that is not given.
    """
    expected = {leaf.tensor: leaf for recipes in bindings.values() for r in recipes.values() for leaf in _takes(r)}
    for name, value in tensors.items():
        leaf = expected.get(name)
        if leaf is None:
            near = difflib.get_close_matches(name[:_LONGEST_NAME], [known for known in expected if known], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise EngineError(f"update_weights: the engine reads no tensor {shown(name)}{hint}")
        if tuple(value.shape) != leaf.shape or value.dtype != NUMPY[leaf.dtype]:
            raise EngineError(
                f"update_weights: {name} is {value.dtype} {tuple(value.shape)}, expected "
                f"{NUMPY[leaf.dtype]} {leaf.shape} as in the checkpoint"
            )
        if not _is_finite(value):
            raise EngineError(f"update_weights: {name} has values that are not finite; nothing was changed")
    changed: dict[str, dict[str, Recipe]] = {}
    for graph, recipes in bindings.items():
        for constant, recipe in recipes.items():
            reads = tensors_of(recipe)
            if not reads & tensors.keys():
                continue
            missing = sorted(reads - tensors.keys())
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise EngineError(
                    f"update_weights: {constant} of graph {graph} also reads {missing[0]}{more}; "
                    "give all tensors that belong together"
                )
            changed.setdefault(graph, {})[constant] = recipe
    return changed


def _is_finite(value: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. Of types that NumPy does not know the bits are looked at: that is quick."""
    if value.dtype == NUMPY["f8e4m3"]:
        return not ((value.view(np.uint8) & 0x7F) == 0x7F).any()
    if value.dtype == NUMPY["bf16"]:
        return not ((value.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(value).all())


def _takes(recipe: Recipe) -> Iterator[Recipe]:
    if recipe.op == "take":
        yield recipe
    for part in recipe.parts:
        yield from _takes(part)
