"""What launches of `DsaAttention` move and compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.formats.paged_cache import latent_row_bytes
from seekforge.plugins.cost.work import Load, Work, visible_keys
from seekforge.plugins.kernels.launch_plan import Launch
from seekforge.plugins.latent_tile import choose_cut
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
    rows, _, _ = launch.grid
    splits = int(launch.arguments["splits"])  # pyright: ignore[reportArgumentType]
    chosen = [min(keys, bound["TOPK"]) for keys in visible_keys(load, bound["Q"])]
    expanded = launch.variant == "attend-expanded"
    cut = choose_cut(heads, c, sm, from_bytes=bound["kv_format"] == "fp8_ds" and not expanded)
    tile = cut.tile
    longest = [cdiv(cdiv(keys, tile.block_n), splits) for keys in chosen]  # steps of the first split, which has most
    used = rows // bound["Q"] * sum(cdiv(cdiv(keys, tile.block_n), n) for keys, n in zip(chosen, longest, strict=True))
    parts = 4 * heads * (used * c + rows * splits)
    if launch.variant.startswith("combine"):
        return Work(
            read_bytes=parts,
            written_bytes=2 * rows * heads * c,
            loaded_bytes=4 * heads * (used * c + rows * splits * launch.grid[2]),
            programs=programs,
        )
    key_bytes = latent_row_bytes(c, r, bound["kv_format"] if not expanded else "bf16")
    keys, topk = rows // bound["Q"] * sum(chosen), bound["TOPK"]
    different = rows // bound["Q"] * min(sum(chosen), max(visible_keys(load, bound["Q"])))
    query_bytes, sharing = 2 * heads * (c + r), launch.grid[1]
    return Work(
        read_bytes=different * key_bytes + rows * (query_bytes + 4 * topk),  # rows of a sequence share what they choose
        written_bytes=parts if splits > 1 else 2 * rows * heads * c,
        # the positions once more in each program, which looks for the last
        loaded_bytes=sharing * keys * (key_bytes + 4) + used * query_bytes * (c // cut.columns) + 4 * programs * topk,
        programs=programs,
        flops=2 * keys * heads * (2 * c + r),
        pass_flops=2 * tile.block_h * tile.block_n * (c + r + cut.columns),
        products="bf16",
        passes=(max(longest),),
    )
