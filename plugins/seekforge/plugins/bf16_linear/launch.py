"""Launches of `Bf16Linear`: multiply, and add splits. The tile is a function of shape and SM alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from seekforge.plugins.kernels.constraints import check_rules, multiple, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Scalar, Variant, Workspace, most_rows
from seekforge.plugins.kernels.sm_limits import is_datacenter
from seekforge.plugins.linear_tile import GROUP, Tile
from seekforge.plugins.operator import cdiv

STATICS: Final = ()
RULES: Final = (
    rule("in features", "K", multiple(64, "one step of the loop")),
    rule("out features", "N", (lambda value: value < 2**24, "below 2^24")),
)
NOTES: Final = ()

#: Most rows of a call that is bound by its weight: tokens are the narrow side.
SMALL_ROWS: Final = 64
#: Rows -> out features of a program that has all of K, of which each of its warps has a part: of more rows what
#: programs read of x would bind the time.
NARROW: Final = {4: 8, 16: 16}
#: Parts of K in such a program.
PARTS: Final = 8
#: Thread blocks that a split call aims at (two per SM of an H100).
SPLIT_BLOCKS: Final = 264
#: Most splits of few rows; of more rows, which are some tiles anyway; and the rows from which there are enough tiles.
MAX_SPLITS, MAX_LARGE_SPLITS, LARGE_TILES, SPLIT_ROWS = 16, 8, 8, 2048
#: K per step of the loop, elements per program of the sum over splits.
BLOCK_K, COMBINE_BLOCK = 64, 1024


def choose_tile(rows: int, n: int, k: int, sm: int) -> Tile:
    """Return the tile of a product of `rows` tokens with a weight [n, k] on `sm`.

    A weight of fewer tiles than `SPLIT_BLOCKS` has programs of all K for the fewest rows, splits of its own for few and
    for more, and none for many: rows do not depend on how many there are within each.
    """
    if cdiv(n, 128) < SPLIT_BLOCKS:
        for block_t in NARROW:
            if rows <= block_t:
                return _narrow(block_t)
    few = rows <= SMALL_ROWS
    tile = _small(16 if rows <= 16 else 32 if rows <= 32 else 64, sm) if few else _large(sm)
    blocks, most = cdiv(n, tile.block_n), MAX_SPLITS
    if not few:
        blocks, most = blocks * LARGE_TILES, MAX_LARGE_SPLITS
    splits = max(1, min(cdiv(SPLIT_BLOCKS, blocks), most, k // BLOCK_K)) if rows <= SPLIT_ROWS else 1
    return replace(tile, splits=splits)


def _narrow(block_t: int) -> Tile:
    return Tile(block_t, NARROW[block_t], True, 1, PARTS, 3, PARTS)


def _small(block_t: int, sm: int) -> Tile:
    num_warps = 8 if block_t == 64 else 4
    return Tile(block_t, 128, True, 1, num_warps, 5 if is_datacenter(sm) else 3)


def _large(sm: int) -> Tile:
    if is_datacenter(sm):
        return Tile(128, 128, False, 1, 8, 4)
    return Tile(64, 128, False, 1, 4, 3)  # 99 KiB of shared memory, mma.sync


def check(statics: Mapping[str, Any]) -> None:
    """Nothing is fixed at compile time, so nothing can be refused."""


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return every tile, and the sum over splits."""
    result = []
    for tile in (*map(_narrow, NARROW), *(_small(block_t, sm) for block_t in (16, 32, 64)), _large(sm)):
        types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*fp32", "num_rows": "i32", "N": "i32", "K": "i32"}
        constants: dict[str, Scalar] = {"BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "BLOCK_K": BLOCK_K}
        if tile.parts > 1:
            kernel = "narrow_kernel"
            constants["PARTS"] = tile.parts
        else:
            kernel = "linear_kernel"
            types["splits"] = "i32"
            constants |= {"GROUP": GROUP, "SWAP": tile.swap}
        result.append(
            Variant(
                tile.name, kernel, types, constants, aligned=("K",),
                num_warps=tile.num_warps, num_stages=tile.num_stages, main_loop=True,
            )
        )  # fmt: skip
    types = {"part_ptr": "*fp32", "y_ptr": "*fp32", "num_elements": "i64", "splits": "i32"}
    result.append(Variant("add-splits", "add_splits_kernel", types, {"BLOCK": COMBINE_BLOCK}))
    return tuple(result)


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """Return the scratch of the largest call of few rows, or of the largest that is split at all."""
    return max(_parts(bound, most_rows(limit, bound["*lead"]), sm)[1] for limit in (SMALL_ROWS, SPLIT_ROWS))


def _parts(bound: Mapping[str, Any], rows: int, sm: int) -> tuple[Buffer | None, int]:
    """Return where splits go, None where there is one, and the size of the workspace."""
    workspace, splits = Workspace(), choose_tile(rows, bound["N"], bound["K"], sm).splits
    parts = workspace.take(4 * splits * rows * bound["N"]) if splits > 1 else None
    return parts, workspace.size


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return one launch or two."""
    rows, n, k = math.prod(bound["*lead"]), bound["N"], bound["K"]
    check_rules("Bf16Linear", RULES, bound)
    if rows == 0 or n == 0:
        return LaunchPlan(())
    tile = choose_tile(rows, n, k, sm)
    parts, size = _parts(bound, rows, sm)
    arguments: dict[str, Buffer | int | float] = {
        "x_ptr": Buffer("x"),
        "w_ptr": Buffer("weight"),
        "y_ptr": parts or Buffer("y"),
        "num_rows": rows,
        "N": n,
        "K": k,
    }
    if tile.parts == 1:
        arguments["splits"] = tile.splits
    launches = [Launch(tile.name, tile.grid(rows, n), arguments)]
    if parts is not None:
        sums: dict[str, Buffer | int | float] = {
            "part_ptr": parts,
            "y_ptr": Buffer("y"),
            "num_elements": rows * n,
            "splits": tile.splits,
        }
        launches.append(Launch("add-splits", (cdiv(rows * n, COMBINE_BLOCK), 1, 1), sums))
    return LaunchPlan(tuple(launches), size)
