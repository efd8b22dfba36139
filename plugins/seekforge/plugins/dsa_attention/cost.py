"""What launches of `DsaAttention` move and compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.formats.paged_cache import latent_row_bytes
from seekforge.plugins.cost.work import Load, Work, visible_keys
from seekforge.plugins.kernels.launch_plan import Launch
from seekforge.plugins.latent_tile import choose_tile
from seekforge.plugins.operator import cdiv


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what attending, combining or expanding does."""
    heads, c, r = (bound[name] for name in ("H", "C", "R"))
    programs = math.prod(launch.grid)
    if launch.variant == "expand":
        positions = bound["MB"] * 64
        record = latent_row_bytes(c, r, "fp8_ds")
        return Work(
            read_bytes=positions * record + 4 * bound["MB"],
            written_bytes=positions * latent_row_bytes(c, r, "bf16"),
            loaded_bytes=positions * record,
            programs=programs,
        )
    if launch.variant == "combine":
        rows, _, _ = launch.grid
        parts = 4 * rows * int(launch.arguments["splits"]) * heads * (c + 1)  # pyright: ignore[reportArgumentType]
        return Work(
            read_bytes=parts,
            written_bytes=2 * rows * heads * c,
            loaded_bytes=parts,
            programs=programs,
            passes=(int(launch.arguments["splits"]),) * 2,  # pyright: ignore[reportArgumentType]
        )
    return _attend(launch, bound, sm, load, programs)


def _attend(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load, programs: int) -> Work:
    heads, c, r, q, topk = (bound[name] for name in ("H", "C", "R", "Q", "TOPK"))
    rows, blocks_h, splits = launch.grid
    expanded = launch.variant == "attend-expanded"
    from_bytes = bound["kv_format"] == "fp8_ds" and not expanded
    tile = choose_tile(heads, sm, from_bytes=from_bytes)
    key_bytes = latent_row_bytes(c, r, "fp8_ds" if from_bytes else "bf16")
    visible = visible_keys(load, q)
    chosen = [min(keys, topk) for keys in visible]
    keys = rows // q * sum(chosen)
    different = rows // q * min(sum(chosen), max(visible))  # rows of one sequence share what they choose
    query_bytes = 2 * heads * (c + r)
    return Work(
        read_bytes=different * key_bytes + rows * (query_bytes + 4 * topk),
        written_bytes=rows * heads * (4 * splits * (c + 1) if splits > 1 else 2 * c),
        loaded_bytes=blocks_h * keys * key_bytes + rows * (splits * query_bytes + 4 * blocks_h * topk),
        programs=programs,
        flops=2 * keys * heads * (2 * c + r),
        pass_flops=2 * tile.block_h * tile.block_n * (2 * c + r),
        products="bf16",
        passes=(cdiv(cdiv(topk, tile.block_n), splits),),  # also where the row has fewer keys
    )
