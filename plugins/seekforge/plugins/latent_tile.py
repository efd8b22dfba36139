"""How attention in the latent space is cut into tiles and parts: of the sparse and of the dense operator."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from seekforge.plugins.kernels.constraints import one_of, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Workspace, most_rows
from seekforge.plugins.kernels.sm_limits import is_datacenter
from seekforge.plugins.operator import cdiv

#: Sizes that the kernels of both take.
RULES: Final = (
    rule("kv_lora_rank", "C", one_of(128, 256, 512)),
    rule("qk_rope_head_dim", "R", one_of(16, 32, 64)),
)
#: Softmax is in base 2.
LOG2_E: Final = 1.4426950408889634
#: Columns of a tile of keys where programs share columns: those that fp8_ds has one scale of.
WIDTH: Final = 128
#: Most parts that the keys of all rows together are cut into: what the workspace holds.
MAX_PARTS: Final = 128


@dataclass(frozen=True)
class Tile:
    """Heads and positions per step, and how the program runs."""

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tile(heads: int, sm: int, *, from_bytes: bool) -> Tile:
    """Return the tile; a function of the head count, the SM and whether keys are widened from bytes."""
    if heads <= 16:
        return Tile(16, 16 if sm in (120, 121) else 32, 4, 1)
    if is_datacenter(sm) and not from_bytes:
        return Tile(64, 32, 8, 2)  # wgmma and tcgen05 need 64 rows
    # widening bytes takes the registers that 64 heads would need
    return Tile(32, 32, 8, 1 if from_bytes else 2)


@dataclass(frozen=True)
class Cut:
    """How a row is cut over programs.

    Attributes:
        tile: heads and positions of a step.
        columns: columns of the latent that a program sums values of; it scores its keys with all of them.
        per_sm: programs that an SM runs at a time.
    """

    tile: Tile
    columns: int
    per_sm: int = 1

    def programs(self, heads: int, c: int) -> int:
        """Return the programs that share the heads and columns of a row and see all of its keys."""
        return cdiv(heads, self.tile.block_h) * (c // self.columns)


def choose_cut(heads: int, c: int, sm: int, *, from_bytes: bool) -> Cut:
    """Return how rows of so many heads are cut.

    wgmma and tcgen05 take 64 rows, and sums of [64, 512] leave no room for a tile of keys in registers, or for a second
    program in tensor memory; sums of half of the columns do, and a second program on the SM multiplies while the first
    waits for its keys or widens them. Scores are computed twice for it. Of few heads there are programs for twice the
    SMs so. Keys that need no widening have all columns on SM100, where sums stay in tensor memory.
    """
    if heads <= 16:
        tile = choose_tile(heads, sm, from_bytes=from_bytes)
        return Cut(tile, min(c, 256), 2) if from_bytes else Cut(tile, c)
    if sm == 90 or (from_bytes and is_datacenter(sm)):
        return Cut(Tile(64, 32, 4, 1), min(c, 256), 2)
    return Cut(choose_tile(heads, sm, from_bytes=from_bytes), c)


@functools.lru_cache(maxsize=1024)
def most_parts(batch: int, queries: int, most_splits: int) -> int:
    """Return the most parts of all rows together, in a step of at most so many sequences and queries of each."""
    return max((s * most_rows(MAX_PARTS // s, (batch, queries)) for s in range(2, most_splits + 1)), default=0)


def take_parts(bound: Mapping[str, Any], parts: int, workspace: Workspace) -> tuple[Buffer, Buffer]:
    """Return the places of f32 values [parts, H, C] and of their log-sums [parts, H]."""
    return workspace.take(4 * parts * bound["H"] * bound["C"]), workspace.take(4 * parts * bound["H"])
