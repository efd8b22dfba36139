"""What launches of `MlaAttention` move and compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.formats.paged_cache import latent_row_bytes
from seekforge.plugins.cost.work import Load, Work, visible_keys
from seekforge.plugins.kernels.launch_plan import Launch
from seekforge.plugins.latent_tile import choose_cut
from seekforge.plugins.mla_attention.launch import COMBINED
from seekforge.plugins.operator import cdiv


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what attending or combining does."""
    heads, c, r, q = (bound[name] for name in ("H", "C", "R", "Q"))
    splits = int(launch.arguments["splits"])  # pyright: ignore[reportArgumentType]
    rows = launch.grid[0]
    part_bytes = 4 * rows * splits * heads * (c + 1)
    if launch.variant == "combine":
        return Work(
            read_bytes=part_bytes,
            written_bytes=2 * rows * heads * c,
            loaded_bytes=part_bytes + 4 * rows * splits * heads,  # the log-sums twice
            programs=math.prod(launch.grid),
            passes=(cdiv(splits, COMBINED),) * 2,
        )
    cut = choose_cut(heads, c, sm, from_bytes=False)
    tile = cut.tile
    key_bytes, query_bytes = latent_row_bytes(c, r, "bf16"), 2 * heads * (c + r)
    visible, sharing = visible_keys(load, q), cut.programs(heads, c)
    keys = rows // q * sum(visible)
    table_bytes = 4 * sharing * sum(cdiv(one, tile.block_n) for one in visible) * (rows // q)
    passes = cdiv(cdiv(max(visible), tile.block_n), splits)
    return Work(
        read_bytes=rows // q * max(visible) * key_bytes + rows * (query_bytes + 8) + 4 * bound["B"] * bound["MB"],
        written_bytes=part_bytes if splits > 1 else 2 * rows * heads * c,
        loaded_bytes=sharing * (keys * key_bytes + 8 * rows * splits)
        + table_bytes
        + rows * splits * query_bytes * (c // cut.columns),
        programs=math.prod(launch.grid),
        flops=2 * keys * heads * (2 * c + r),
        pass_flops=2 * tile.block_h * tile.block_n * (c + r + cut.columns),
        products="bf16",
        passes=(passes,),
    )
