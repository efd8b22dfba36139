"""How a product with a weight is cut into tiles, and the order in which they are run: of both linear operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from seekforge.plugins.operator import cdiv

#: Tiles of rows that are run one after another with the same weight, so that it is read from L2.
GROUP: Final = 8


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
    """

    block_t: int
    block_n: int
    swap: bool
    splits: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Name of the tile, which is the same for any number of splits."""
        return f"{'swap' if self.swap else 'tile'}-{self.block_t}x{self.block_n}"

    def grid(self, rows: int, n: int) -> tuple[int, int, int]:
        """Return the programs of a product of `rows` tokens with `n` out features: tiles, splits, 1."""
        return (cdiv(rows, self.block_t) * cdiv(n, self.block_n), self.splits, 1)
