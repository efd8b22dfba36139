"""What launches of `BlockFp8Linear` move and compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.plugins.block_fp8_linear.launch import choose_tile, quantizes
from seekforge.plugins.cost.work import Load, Work
from seekforge.plugins.kernels.launch_plan import Launch
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.operator import cdiv


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what the quantizer, the product or the sum over splits does."""
    rows, n, k = math.prod(bound["*lead"]), bound["N"], bound["K"]
    if launch.variant == "quantize":
        return quantize_work(launch, rows, k)
    quant = bound["act_quant"] == "ue8m0"
    tile = choose_tile(rows, n, k, sm, quant=quant)
    if launch.variant == "combine":
        parts = 4 * tile.splits * rows * n
        return Work(
            read_bytes=parts,
            written_bytes=2 * rows * n,
            loaded_bytes=parts,
            programs=math.prod(launch.grid),
            passes=(tile.splits,),
        )
    programs = math.prod(launch.grid)
    quantized = quant and not quantizes(tile, bound)
    x_bytes, x_value = (rows * (k + 4 * (k // 128)), 1) if quantized else (2 * rows * k, 2)
    return Work(
        read_bytes=x_bytes + n * k + 4 * cdiv(n, 128) * (k // 128),
        written_bytes=rows * n * (4 * tile.splits if tile.splits > 1 else 2),
        loaded_bytes=programs * (x_value * tile.block_t + tile.block_n) * (k // tile.splits),
        programs=programs,
        flops=2 * rows * n * k,
        pass_flops=2 * tile.block_t * tile.block_n * 128 * tile.parts,
        products="fp8" if quant and has_fp8(sm) else "bf16",
        passes=(cdiv(k // 128, tile.splits * tile.parts),),
    )


def quantize_work(launch: Launch, rows: int, k: int) -> Work:
    """Return what quantizing x [rows, k] does, which the experts do too."""
    return Work(
        read_bytes=2 * rows * k,
        written_bytes=rows * k + 4 * rows * (k // 128),
        loaded_bytes=2 * rows * k,
        programs=math.prod(launch.grid),
    )
