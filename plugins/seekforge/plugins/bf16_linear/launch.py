"""Launches of `Bf16Linear`: multiply, and add splits. The tile is a function of shape and SM alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from seekforge.plugins.kernels.constraints import check_rules, multiple, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Scalar, Variant, Workspace, most_rows
from seekforge.plugins.kernels.sm_limits import is_datacenter
from seekforge.plugins.linear_tile import GROUP, Form, Tile, choose, row_limits
from seekforge.plugins.operator import cdiv

STATICS: Final = ()
RULES: Final = (
    rule("in features", "K", multiple(64, "one step of the loop")),
    rule("out features", "N", (lambda value: value < 2**24, "below 2^24")),
)
NOTES: Final = ()

#: Most rows of a call in which out features are the M side; most rows whose K is split.
SWAP_ROWS, SPLIT_ROWS = 32, 2048
#: Rows -> out features of a program that has all of K, of which each of its warps has a part: of more rows what
#: programs read of x would bind the time.
NARROW: Final = {4: 8, 16: 16}
#: Parts of K in such a program.
PARTS: Final = 8
#: Blocks of 128 out features from which on a weight has programs enough with no others.
MANY_BLOCKS: Final = 264
#: K per step of the loop, elements per program of the sum over splits.
BLOCK_K, COMBINE_BLOCK = 64, 1024


def choose_tile(rows: int, n: int, k: int, sm: int) -> Tile:
    """Return the tile of a product of `rows` tokens with a weight [n, k] on `sm`.

    A weight of few blocks has programs of all K for the fewest rows.
    """
    if cdiv(n, 128) < MANY_BLOCKS:
        for block_t in NARROW:
            if rows <= block_t:
                return _narrow(block_t)
    return choose(_forms(rows, sm), rows, n, k // BLOCK_K, split=rows <= SPLIT_ROWS)


def _narrow(block_t: int) -> Tile:
    return Tile(block_t, NARROW[block_t], True, 1, PARTS, 3, PARTS)


def _forms(rows: int, sm: int) -> tuple[Form, ...]:
    """Return the tiles that a product of more tokens may be cut into."""
    datacenter = is_datacenter(sm)
    if rows <= SWAP_ROWS:
        block_t = 16 if rows <= 16 else 32
        return (Form(Tile(block_t, 128, True, 1, 4, 5 if datacenter else 3), 2, 2 if block_t == 16 else 3),)
    small = Form(Tile(64, 128, False, 1, 4, 4 if datacenter else 3), 2, 3)
    if rows <= 64 or not datacenter:
        return (small,)  # 99 KiB of shared memory
    return (Form(Tile(128, 128, False, 1, 8, 3), 2, 5), small)


def check(statics: Mapping[str, Any]) -> None:
    """Nothing is fixed at compile time, so nothing can be refused."""


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return every tile, and the sum over splits."""
    result = []
    others = [form.tile for rows in (16, 32, SPLIT_ROWS) for form in _forms(rows, sm)]
    for tile in (*map(_narrow, NARROW), *others):
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
    """Return the scratch of the largest call whose K is split."""
    return max(_parts(bound, most_rows(limit, bound["*lead"]), sm)[1] for limit in row_limits(SPLIT_ROWS))


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
