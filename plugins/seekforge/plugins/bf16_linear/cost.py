"""What launches of `Bf16Linear` move and compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.plugins.bf16_linear.launch import BLOCK_K, choose_tile
from seekforge.plugins.cost.work import Load, Work
from seekforge.plugins.kernels.launch_plan import Launch
from seekforge.plugins.operator import cdiv


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what the product or the sum over splits does."""
    rows, n, k = math.prod(bound["*lead"]), bound["N"], bound["K"]
    tile, programs = choose_tile(rows, n, k, sm), math.prod(launch.grid)
    if launch.variant == "add-splits":
        parts = 4 * tile.splits * rows * n
        return Work(
            read_bytes=parts,
            written_bytes=4 * rows * n,
            loaded_bytes=parts,
            programs=programs,
            passes=(tile.splits,),
        )
    return Work(
        read_bytes=2 * k * (rows + n),
        written_bytes=4 * tile.splits * rows * n,
        loaded_bytes=2 * programs * (tile.block_t + tile.block_n) * (k // tile.splits),
        programs=programs,
        flops=2 * rows * n * k,
        pass_flops=2 * tile.block_t * tile.block_n * BLOCK_K * tile.parts,
        products="bf16",
        passes=(cdiv(k // BLOCK_K, tile.splits * tile.parts),),
    )
