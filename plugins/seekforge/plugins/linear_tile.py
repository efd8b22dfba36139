"""How a product with a weight is cut into tiles, and the order in which they are run: of both linear operators.

Few rows have programs of few out features and all of K. Of more rows, programs run in waves, and a wave lasts as long
as one of its programs: a weight of few tiles would leave most SMs idle for as long as K is. So K is cut into splits,
whose sums are added by a second launch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from seekforge.plugins.operator import cdiv

#: Most splits of K.
MAX_SPLITS: Final = 16
#: SMs of the GPU that waves are counted for, an H100, and steps along K that a program takes beside its own: the first
#: loads, and what it stores.
_SMS, _STEPS_BESIDE = 132, 2
#: In units of 256 clocks of that GPU: a launch that adds splits and the gap before it; and how many blocks of a weight
#: (128 rows of a step), and tiles of split sums (128 x 128, written and read), memory moves in one.
_ADD_SPLITS, _BLOCKS, _SUMS = 15, 26, 3
#: Tiles of rows that are run one after another with the same weight, so that it is read from L2.
GROUP: Final = 8
#: Parts of K in a program of few out features, which its warps multiply beside each other.
PARTS: Final = 4
#: Why the products of such a program are mma.sync's where there is wgmma or tcgen05.
FEW_FEATURES: Final = "a program has 8 to 32 rows of the weight, so that programs fill the GPU; others take 64 or more"
#: Programs that fill a GPU (three for two SMs of an H100): 32 out features each where that gives as many, else 16.
NARROW_PROGRAMS: Final = 198


def narrow_block(n: int) -> int:
    """Return how many of `n` out features a program of few rows has: a function of the weight alone."""
    return 32 if cdiv(n, 32) >= NARROW_PROGRAMS else 16


@dataclass(frozen=True)
class Tile:
    """How one product is cut.

    Attributes:
        block_t: tokens per tile.
        block_n: out features per tile.
        swap: whether out features are the M side.
        splits: parts of K.
        num_warps: warps of a program.
        num_stages: stages of the load pipeline.
        parts: parts of K within a program, whose sums it adds; all rows are in one tile then.
    """

    block_t: int
    block_n: int
    swap: bool
    splits: int
    num_warps: int
    num_stages: int
    parts: int = 1

    @property
    def name(self) -> str:
        """Name of the tile, which is the same for any number of splits."""
        form = "narrow" if self.parts > 1 else "swap" if self.swap else "tile"
        return f"{form}-{self.block_t}x{self.block_n}"

    def grid(self, rows: int, n: int) -> tuple[int, int, int]:
        """Return the programs of a product of `rows` tokens with `n` out features: tiles, splits, 1."""
        return (cdiv(rows, self.block_t) * cdiv(n, self.block_n), self.splits, 1)


@dataclass(frozen=True)
class Form:
    """A tile that a product may be cut into, and how long it takes.

    Attributes:
        tile: the tile, without splits.
        per_sm: programs that an SM runs at a time.
        units: time of one step along K of so many programs on every SM, in units of 256 clocks.
    """

    tile: Tile
    per_sm: int
    units: int


def choose(forms: Iterable[Form], rows: int, n: int, steps: int, *, split: bool) -> Tile:
    """Return the tile and the splits that take the least time, the fewest splits and the first form of equals.

    Rows count in blocks of the smallest tile: what a row gives does not depend on how many others are in its block.

    Args:
        forms: tiles to choose from.
        rows: tokens of the call.
        n: out features.
        steps: steps along K, of 128 bytes of a row each.
        split: whether K may be split.
    """
    known = tuple(forms)
    smallest = min(form.tile.block_t for form in known)
    return _choose(known, cdiv(rows, smallest) * smallest, n, steps, min(MAX_SPLITS, steps) if split else 1)


@functools.lru_cache(maxsize=1 << 14)
def _choose(forms: tuple[Form, ...], rows: int, n: int, steps: int, most: int) -> Tile:
    def units(form: Form, splits: int) -> float:
        programs = form.tile.grid(rows, n)[0] * splits
        waves = cdiv(programs, _SMS * form.per_sm)
        products = waves * (cdiv(steps, splits) + _STEPS_BESIDE) * form.units
        weight = cdiv(n, 128) * steps / _BLOCKS * max(1.0, _SMS / programs)  # an SM gets its share of what memory gives
        adding = 0.0 if splits == 1 else _ADD_SPLITS + splits * rows * n / (_SUMS * 128 * 128)
        return max(products, weight) + adding

    cuts = [(form, splits) for form in forms for splits in range(1, most + 1)]
    form, splits = min(cuts, key=lambda cut: units(*cut))
    return replace(form.tile, splits=splits)


def row_limits(most: int) -> Iterator[int]:
    """Yield the most rows of each number of tiles, up to `most`: within one, more rows have larger sums of splits."""
    yield 16
    yield from range(32, most + 1, 32)
