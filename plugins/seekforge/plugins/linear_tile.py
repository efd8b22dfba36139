"""How a product with a weight is cut into tiles, and the order in which they are run: of both linear operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from seekforge.plugins.operator import cdiv

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
