"""Launches of `BlockFp8Linear`: quantize, multiply, and add splits. The tile is a function of shape and SM alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import check_rules, multiple, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Scalar, Variant, Workspace, most_rows
from seekforge.plugins.kernels.sm_limits import has_fp8, is_datacenter
from seekforge.plugins.linear_tile import GROUP, PARTS, Form, Tile, choose, narrow_block, row_limits
from seekforge.plugins.operator import cdiv

STATICS: Final = ("act_quant",)
#: So that places inside of a tile have 32 bits.
_BELOW: Final = (lambda value: value < 2**24, "below 2^24")
RULES: Final = (
    rule("in features", "K", multiple(128, "one FP8 block")),
    rule("in features", "K", _BELOW),
    rule("out features", "N", _BELOW),
)
NOTES: Final = ()

#: Most rows whose K is split.
SPLIT_ROWS: Final = 2048
#: Most rows that every program quantizes for itself: of more it costs more than the launch that it saves.
QUANTIZE_IN_PLACE: Final = 4
#: Rows per program of the quantizer, elements per program of the sum over splits.
QUANTIZE_ROWS, COMBINE_BLOCK = 8, 1024


def choose_tile(rows: int, n: int, k: int, sm: int, *, quant: bool) -> Tile:
    """Return the tile of a product of `rows` tokens, which are quantized or not, with a weight [n, k] on `sm`."""
    for block_t in _narrow_rows(sm):
        if rows <= block_t:
            return _narrow(block_t, narrow_block(n))
    return choose(_forms(rows, sm, quant=quant), rows, n, k // 128, split=rows <= SPLIT_ROWS)


def _narrow_rows(sm: int) -> tuple[int, ...]:
    # of 64 rows mma.sync would bind the time where tcgen05 is, not the weight
    return (2, QUANTIZE_IN_PLACE, 16, 32) if sm in (100, 103) else (2, QUANTIZE_IN_PLACE, 16, 32, 64)


def _narrow(block_t: int, block_n: int) -> Tile:
    return Tile(block_t, block_n, True, 1, PARTS, 3, PARTS)


def _forms(rows: int, sm: int, *, quant: bool) -> tuple[Form, ...]:
    """Return the tiles that a product of many tokens may be cut into."""
    small = Form(Tile(64, 128, False, 1, 4, 3), 2, 3)
    # 99 KiB of shared memory; of rows that are not quantized weights are widened, which tiles of 128 do no faster
    if rows <= 64 or not is_datacenter(sm) or not quant:
        return (small,)
    if sm == 90:
        return (Form(Tile(128, 128, False, 1, 4, 3), 2, 5), small)
    return (Form(Tile(128, 128, False, 1, 8, 3), 1, 3), small)


def _quant(values: Mapping[str, Any]) -> bool:
    return values["act_quant"] == "ue8m0"


def _variant(tile: Tile, *, partial: bool, in_place: bool) -> str:
    """Return the name of a tile's kernel: one of splits writes its parts in FP32, few rows may be quantized in it."""
    return tile.name + ("-split" if partial else "-quantize" if in_place else "")


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernels cannot do."""
    if statics["act_quant"] not in ("ue8m0", "none"):
        raise ShapeError(f"BlockFp8Linear: act_quant is {statics['act_quant']}, kernels take ue8m0 and none")


def is_quantized(bound: Mapping[str, Any]) -> bool:
    """Return whether the rows of a call are quantized already."""
    return bound.get("KB", 0) > 0


def quantizes(tile: Tile, bound: Mapping[str, Any]) -> bool:
    """Return whether the product quantizes its rows itself."""
    return _quant(bound) and tile.block_t <= QUANTIZE_IN_PLACE and not is_quantized(bound)


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return the quantizer, every tile, and the sums over splits."""
    quant, fp8 = _quant(statics), has_fp8(sm)
    code = "*fp8e4nv" if fp8 else "*u8"
    result = []
    if quant:
        result.append(quantizer(sm))
    narrow = [_narrow(block_t, block_n) for block_t in _narrow_rows(sm) for block_n in (16, 32)]
    large = [form.tile for form in _forms(SPLIT_ROWS, sm, quant=quant)]
    cuts = [(tile, False, False) for tile in narrow]
    cuts += [(tile, False, True) for tile in narrow if quantizes(tile, statics)]
    cuts += [(tile, partial, False) for tile in large for partial in (False, True)]
    for tile, partial, in_place in cuts:
        types = {
            "a_ptr": code if quant and not in_place else "*bf16",
            "a_scale_ptr": "*fp32",
            "w_ptr": code,
            "w_scale_ptr": "*fp32",
            "y_ptr": "*fp32" if partial else "*bf16",
            "num_rows": "i32",
            "N": "i32",
            "K": "i32",
        }
        constants: dict[str, Scalar] = {"BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "QUANT": quant, "FP8": fp8}
        if tile.parts > 1:
            kernel = "narrow_kernel"
            constants |= {"PARTS": tile.parts, "QUANTIZE": in_place}
        else:
            kernel = "tile_kernel"
            types["splits"] = "i32"
            # sums and a product of [128, 128] fill the registers of four warps
            columns = 64 if tile.block_t == 128 and tile.num_warps == 4 else 128
            constants |= {"COLUMNS": columns, "GROUP": GROUP, "PARTIAL": partial}
        result.append(
            Variant(
                _variant(tile, partial=partial, in_place=in_place), kernel, types, constants, aligned=("K",),
                num_warps=tile.num_warps, num_stages=tile.num_stages, main_loop=True,
            )
        )  # fmt: skip
    types = {"part_ptr": "*fp32", "y_ptr": "*bf16", "num_elements": "i64", "splits": "i32"}
    result.append(Variant("combine", "combine_splits_kernel", types, {"BLOCK": COMBINE_BLOCK}))
    return tuple(result)


def quantizer(sm: int) -> Variant:
    """Return the activation quantizer, which the experts use too."""
    types = {"x_ptr": "*bf16", "q_ptr": "*u8", "scale_ptr": "*fp32", "num_rows": "i32", "K": "i32"}
    return Variant("quantize", "quantize_kernel", types, {"ROWS": QUANTIZE_ROWS, "FP8": has_fp8(sm)}, aligned=("K",))


def quantize(x: Buffer, rows: int, k: int, workspace: Workspace) -> tuple[Launch, Buffer, Buffer]:
    """Return the launch that quantizes x [rows, k], and where bytes and scales go."""
    q, scale = workspace.take(rows * k), workspace.take(4 * rows * (k // 128))
    arguments: dict[str, Buffer | int | float] = {
        "x_ptr": x,
        "q_ptr": q,
        "scale_ptr": scale,
        "num_rows": rows,
        "K": k,
    }
    return Launch("quantize", (cdiv(rows, QUANTIZE_ROWS), k // 128, 1), arguments), q, scale


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """Return the scratch of the largest call, or of a smaller one whose K is split: parts may take more than rows."""
    rows = {math.prod(bound["*lead"]), *(most_rows(limit, bound["*lead"]) for limit in row_limits(SPLIT_ROWS))}
    return max(_scratch(bound, one, sm).size for one in rows)


@dataclass(frozen=True)
class _Scratch:
    """How a call is cut and what it keeps in its workspace; `quantize` and `parts` are None where it needs none."""

    tile: Tile
    size: int
    quantize: Launch | None
    a: Buffer
    a_scale: Buffer
    parts: Buffer | None


def _scratch(bound: Mapping[str, Any], rows: int, sm: int) -> _Scratch:
    n, k = bound["N"], bound["K"]
    workspace, tile = Workspace(), choose_tile(rows, n, k, sm, quant=_quant(bound))
    launch, a, a_scale = None, Buffer("x"), Buffer("weight_scale")  # scales of x are read of quantized rows alone
    if is_quantized(bound):
        a, a_scale = Buffer("x_codes"), Buffer("x_scale")
    elif _quant(bound) and not quantizes(tile, bound):
        launch, a, a_scale = quantize(a, rows, k, workspace)
    parts = workspace.take(4 * tile.splits * rows * n) if tile.splits > 1 else None
    return _Scratch(tile, workspace.size, launch, a, a_scale, parts)


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return one to three launches."""
    rows, n, k = math.prod(bound["*lead"]), bound["N"], bound["K"]
    check_rules("BlockFp8Linear", RULES, bound)
    if is_quantized(bound) and (bound["KB"] != k // 128 or not _quant(bound)):
        raise ShapeError(f"BlockFp8Linear: x_scale has {bound['KB']} blocks and act_quant is {bound['act_quant']}")
    if rows == 0 or n == 0:
        return LaunchPlan(())
    scratch = _scratch(bound, rows, sm)
    tile = scratch.tile
    launches = [] if scratch.quantize is None else [scratch.quantize]
    arguments: dict[str, Buffer | int | float] = {
        "a_ptr": scratch.a,
        "a_scale_ptr": scratch.a_scale,
        "w_ptr": Buffer("weight"),
        "w_scale_ptr": Buffer("weight_scale"),
        "y_ptr": scratch.parts or Buffer("y"),
        "num_rows": rows,
        "N": n,
        "K": k,
    }
    if tile.parts == 1:
        arguments["splits"] = tile.splits
    kernel = _variant(tile, partial=tile.splits > 1, in_place=quantizes(tile, bound))
    launches.append(Launch(kernel, tile.grid(rows, n), arguments))
    if scratch.parts is not None:
        sums: dict[str, Buffer | int | float] = {
            "part_ptr": scratch.parts,
            "y_ptr": Buffer("y"),
            "num_elements": rows * n,
            "splits": tile.splits,
        }
        launches.append(Launch("combine", (cdiv(rows * n, COMBINE_BLOCK), 1, 1), sums))
    return LaunchPlan(tuple(launches), scratch.size)
