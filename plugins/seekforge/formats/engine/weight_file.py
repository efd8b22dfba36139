"""Where constants lie in the weight file of a CPU engine. Numbers alone: what they hold is the builder's business."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Final

from seekforge.common.dtypes import NUMPY
from seekforge.formats.weight_recipes import Recipe

WEIGHTS: Final = "weights.bin"
#: Offsets in the file are multiples of this, so that it can be mapped.
ALIGNMENT: Final = 4096


class WeightLayout:
    """Gives every constant its place: one after the other as they are asked for, equal recipes once.

    Attributes:
        num_bytes: size of the file so far.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._offsets: dict[str, int] = {}

    def place(self, recipe: Recipe) -> tuple[int, bool]:
        """Return where a constant lies, and whether it had no place before."""
        key = json.dumps(recipe.to_dict())
        if key in self._offsets:
            return self._offsets[key], False
        self._offsets[key] = -(-self.num_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = self._offsets[key] + constant_bytes(recipe)
        return self._offsets[key], True


def constant_bytes(recipe: Recipe) -> int:
    """Return the size of what a recipe makes."""
    return NUMPY[recipe.dtype].itemsize * math.prod(recipe.shape)


def constants_in(graphs: Iterable[Mapping[str, Recipe]], begin: int, end: int) -> list[str]:
    """Return the constants that have bytes in [begin, end) of the weight file, as the first graph names them.

    Args:
        graphs: the constants of each graph, as bindings.json of the engine lists them.
        begin, end: a range of the file.
    """
    layout, names = WeightLayout(), []
    for constants in graphs:
        for name, recipe in constants.items():
            start, new = layout.place(recipe)
            if new and start < end and begin < start + constant_bytes(recipe):
                names.append(name)
    return names


def is_divided(recipe: Recipe) -> bool:
    """Whether each tensor-parallel rank has another value of a constant."""
    of_a_rank = recipe.op == "split" or (recipe.op == "computed" and recipe.tensor in ("expert_map", "vocab_start"))
    return of_a_rank or any(map(is_divided, recipe.parts))


def own_layout(pieces: Mapping[str, Mapping[str, Recipe]]) -> tuple[dict[str, dict[str, int]], int]:
    """Return where the constants lie that ranks divide, in the file that a rank has of its own, and the file's size.

    Args:
        pieces: the constants of each piece of a pipeline stage, in the order in which it runs them.

    Returns:
        Piece -> constant -> offset, the same for every rank of the stage; bytes.
    """
    layout = WeightLayout()
    offsets = {
        piece: {name: layout.place(recipe)[0] for name, recipe in constants.items() if is_divided(recipe)}
        for piece, constants in pieces.items()
    }
    return offsets, layout.num_bytes
