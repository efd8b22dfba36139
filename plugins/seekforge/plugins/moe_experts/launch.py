"""Launches of `MoeExperts`: group, quantize, up, down, combine; in slices of tokens so that scratch stays bounded.

Few tokens: up and down alone, which do the rest themselves. Rows that come quantized are not quantized again. A shared
expert is more rows of the same launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from seekforge.common.errors import ShapeError, TargetError
from seekforge.formats.quantization.nvfp4 import row_bytes
from seekforge.formats.targets import NVFP4_SM
from seekforge.plugins.block_fp8_linear.launch import quantize, quantizer
from seekforge.plugins.kernels.constraints import between, check_rules, multiple, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Variant, Workspace, next_power_of_two
from seekforge.plugins.kernels.sm_limits import has_fp8, is_datacenter
from seekforge.plugins.linear_tile import PARTS
from seekforge.plugins.moe_experts.spec import takes_shared
from seekforge.plugins.operator import cdiv

STATICS: Final = ("E", "TOPK", "H", "I2", "W13", "act_quant")
RULES: Final = (
    rule("hidden_size", "H", multiple(128, "one FP8 block")),
    rule("moe_intermediate_size", "I2", multiple(128, "one FP8 block"), factor=2),
    rule("n_routed_experts", "E", between(1, 1024)),
    rule("num_experts_per_tok", "TOPK", between(1, 16)),
)
NOTES: Final = ("on SMs from 100 on weights may be NVFP4",)

#: Tokens of one slice.
SLICE_TOKENS: Final = 2048
#: Assignments of one program of the grouping; as many as 32 tokens have, so that most decode steps need one program.
CHUNK: Final = 256
#: Of the grouping: assignments that each of them is compared with at a time, and counts that are added at a time.
COLUMNS, COUNTS = 64, 8192
#: Columns of one program of the sum.
COMBINE_BLOCK: Final = 1024
#: Rows of an expert's weight that a program of few tokens has (and as many up rows).
NARROW_ROWS: Final = 16


@dataclass(frozen=True)
class Tile:
    """How the grouped products are cut.

    Attributes:
        block_m: sorted rows per tile; a tile has rows of one expert.
        swap: whether weight rows are the M side.
        num_warps: warps of a program.
        num_stages: stages of the load pipeline.
    """

    block_m: int
    swap: bool
    num_warps: int
    num_stages: int


def tiles(sm: int, *, nvfp4: bool = False) -> dict[int, Tile]:
    """Return the tiles of an SM by rows; NVFP4 weights are widened in registers, which larger tiles need."""
    if nvfp4:
        more = 64 if is_datacenter(sm) else 32  # 64 rows spill where tensor instructions keep sums in registers
        return {16: Tile(16, True, 8, 3), more: Tile(more, False, 8, 3)}
    tiles = {16: Tile(16, True, 8, 3), 64: Tile(64, False, 8, 3)}
    if is_datacenter(sm):
        tiles[128] = Tile(128, False, 8, 3)
    return tiles


def choose_tile(assignments: int, experts: int, sm: int, *, nvfp4: bool = False) -> Tile:
    """Return the tile for a mean number of rows per expert."""
    mean = assignments / experts
    wanted = 16 if mean <= 8 else 64 if mean <= 48 else 128
    known = tiles(sm, nvfp4=nvfp4)
    return known[min(wanted, max(known))]


def few_tokens(sm: int) -> int:
    """Return the most tokens that are not grouped; with more, programs do more in all than grouping costs.

    On SM80, which widens bytes by hand, each program of a token does that for itself.
    """
    return 8 if has_fp8(sm) else 4


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernels cannot do."""
    check_rules("MoeExperts", RULES, statics)
    widths = (statics["H"], row_bytes(statics["H"]))
    if statics["W13"] not in widths:
        taken = f"{widths[0]} (FP8) or {widths[1]} (NVFP4)"
        raise ShapeError(f"MoeExperts: rows of w13 have {statics['W13']} bytes, kernels take {taken}")


def is_quantized(bound: Mapping[str, Any]) -> bool:
    """Return whether the rows of a call are quantized already."""
    return bound.get("HB", 0) > 0


def quantizes(bound: Mapping[str, Any]) -> bool:
    """Return whether a call has to quantize its rows."""
    return bound["act_quant"] == "ue8m0" and not is_quantized(bound)


def shared_inner(bound: Mapping[str, Any]) -> int:
    """Return the width of the shared expert of a call; 0 without one."""
    return bound.get("S2", 0) // 2


def is_nvfp4(statics: Mapping[str, Any]) -> bool:
    """Return whether weights are NVFP4."""
    return statics["W13"] != statics["H"]


def _product(name: str, tile: Tile, statics: Mapping[str, Any]) -> str:
    """Return the variant of the product `name` with a tile; its rows stand behind the last hyphen."""
    return f"{name}{'-nvfp4' if is_nvfp4(statics) else ''}-{tile.block_m}"


def _narrow(name: str, statics: Mapping[str, Any], *, in_place: bool = False) -> str:
    """Return the variant of the product `name` for few tokens; rows may be quantized in it."""
    return f"narrow-{name}{'-nvfp4' if is_nvfp4(statics) else ''}{'-quantize' if in_place else ''}"


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return the quantizer, the grouping, both products for every tile, the sum, and products of few tokens."""
    quant, fp8, nvfp4 = statics["act_quant"] == "ue8m0", has_fp8(sm), is_nvfp4(statics)
    if nvfp4 and sm < NVFP4_SM:
        raise TargetError(f"MoeExperts: sm {sm} takes no NVFP4 weights, SMs from {NVFP4_SM} on do; build with FP8 ones")
    code = "*fp8e4nv" if fp8 else "*u8"
    weights = "*u8" if nvfp4 else code
    rows = code if quant else "*bf16"
    sizes = {"H": statics["H"], "INNER": statics["I2"] // 2, "TOPK": statics["TOPK"]}
    both, aligned = _weights(weights), ("shared_inner",)
    counts = {"max_tiles": "i32", "num_assignments": "i32", "shared_inner": "i32"}
    result = [quantizer(sm)] if quant else []
    bins = next_power_of_two(statics["E"])
    grouping = {"E": statics["E"], "BINS": bins, "CHUNK": CHUNK}
    types = {"ids_ptr": "*i32", "count_ptr": "*i32", "num_assignments": "i32"}
    result.append(Variant("count", "count_kernel", types, grouping))
    types = {"ids_ptr": "*i32", "count_ptr": "*i32", "order_ptr": "*i32", "place_ptr": "*i32", "tile_ptr": "*i32"}
    types |= {"num_assignments": "i32", "max_tiles": "i32", "block_m": "i32"}
    constants = grouping | {"ROWS": COUNTS // bins, "COLUMNS": COLUMNS}
    result.append(Variant("place", "place_kernel", types, constants, ("block_m",), num_warps=8))
    for tile in tiles(sm, nvfp4=nvfp4).values():
        flags = {"BLOCK_M": tile.block_m, "SWAP": tile.swap, "QUANT": quant, "FP8": fp8, "NVFP4": nvfp4}
        types = {
            "x_ptr": rows,
            "x_scale_ptr": "*fp32",
            **both,
            "h_ptr": "*u8" if quant else "*bf16",
            "h_scale_ptr": "*fp32",
            "order_ptr": "*i32",
            "tile_ptr": "*i32",
            **counts,
        }
        loop: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "main_loop": True}
        constants = sizes | flags
        result.append(Variant(_product("up", tile, statics), "up_kernel", types, constants, aligned, **loop))
        types = {"h_ptr": rows, "h_scale_ptr": "*fp32", **both, "out_ptr": "*bf16", "tile_ptr": "*i32", **counts}
        result.append(Variant(_product("down", tile, statics), "down_kernel", types, constants, aligned, **loop))
    types = {"out_ptr": "*bf16", "place_ptr": "*i32", "weight_ptr": "*fp32", "y_ptr": "*fp32", "shared_inner": "i32"}
    constants = {"H": statics["H"], "TOPK": statics["TOPK"], "BLOCK": COMBINE_BLOCK}
    result.append(Variant("combine", "combine_kernel", types, constants))
    return (*result, *_narrow_variants(statics, sm))


def _weights(kind: str) -> dict[str, str]:
    """Return the types of pointers to a product's weights: those of the experts, and of the shared one."""
    return {"w_ptr": kind, "w_scale_ptr": "*fp32", "shared_ptr": kind, "shared_scale_ptr": "*fp32"}


def _narrow_variants(statics: Mapping[str, Any], sm: int) -> Iterator[Variant]:
    quant, fp8 = statics["act_quant"] == "ue8m0", has_fp8(sm)
    code, nvfp4 = "*fp8e4nv" if fp8 else "*u8", is_nvfp4(statics)
    weights = _weights("*u8" if nvfp4 else code)
    sizes = {"E": statics["E"], "H": statics["H"], "INNER": statics["I2"] // 2, "TOPK": statics["TOPK"]}
    constants = sizes | {"ROWS": NARROW_ROWS, "PARTS": PARTS, "QUANT": quant, "FP8": fp8, "NVFP4": nvfp4}
    loop: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "main_loop": True, "aligned": ("shared_inner",)}
    for in_place in (False, True) if quant else (False,):
        rows = {"x_ptr": code if quant and not in_place else "*bf16", "x_scale_ptr": "*fp32", "ids_ptr": "*i32"}
        types = rows | weights | {"h_ptr": "*bf16", "num_assignments": "i32", "shared_inner": "i32"}
        name = _narrow("up", statics, in_place=in_place)
        yield Variant(name, "narrow_up_kernel", types, constants | {"QUANTIZE": in_place}, **loop)
    types = {"h_ptr": "*bf16", "ids_ptr": "*i32", "weight_ptr": "*fp32"} | weights
    types |= {"y_ptr": "*fp32", "shared_inner": "i32"}
    yield Variant(_narrow("down", statics), "narrow_down_kernel", types, constants, **loop)


@dataclass(frozen=True)
class _Scratch:
    counts: Buffer
    order: Buffer
    place: Buffer
    tiles: Buffer
    h: Buffer
    h_scale: Buffer
    out: Buffer


def _rows(bound: Mapping[str, Any], tokens: int) -> int:
    """Return the rows between both products: one of each assignment, and of each token for a shared expert."""
    return tokens * (bound["TOPK"] + (1 if shared_inner(bound) else 0))


def _scratch(bound: Mapping[str, Any], tokens: int, workspace: Workspace) -> _Scratch:
    assignments, inner, rows = tokens * bound["TOPK"], bound["I2"] // 2, _rows(bound, tokens)
    most_tiles = cdiv(assignments, 16) + min(bound["E"], assignments)
    quant = bound["act_quant"] == "ue8m0"
    runs = cdiv(assignments, CHUNK)
    return _Scratch(
        counts=workspace.take(4 * runs * next_power_of_two(bound["E"]) if runs > 1 else 0),
        order=workspace.take(4 * assignments),
        place=workspace.take(4 * assignments),
        tiles=workspace.take(3 * 4 * most_tiles),
        h=workspace.take(rows * inner * (1 if quant else 2)),
        h_scale=workspace.take(4 * rows * (inner // 128)),
        out=workspace.take(2 * rows * bound["H"]),
    )


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """Return the scratch of one slice, which grows with the tokens up to `SLICE_TOKENS`, or of few tokens."""
    few = _narrow_plan({**bound, "T": min(bound["T"], few_tokens(sm))}).workspace_bytes
    if bound["T"] <= few_tokens(sm):
        return few
    tokens, workspace = min(bound["T"], SLICE_TOKENS), Workspace()
    _scratch(bound, tokens, workspace)
    if quantizes(bound):
        quantize(Buffer("x"), tokens, bound["H"], workspace)
    return max(workspace.size, few)


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return two launches for few tokens, else four to six per slice of tokens.

    Six where rows are to be quantized, and assignments fill more than one run.
    """
    _check_optional(bound)
    if 0 < bound["T"] <= few_tokens(sm):
        return _narrow_plan(bound)
    launches: list[Launch] = []
    size = 0
    for first in range(0, bound["T"], SLICE_TOKENS):
        workspace = Workspace()
        launches += _slice_plan(bound, first, min(SLICE_TOKENS, bound["T"] - first), sm, workspace)
        size = max(size, workspace.size)
    return LaunchPlan(tuple(launches), size)


def _check_optional(bound: Mapping[str, Any]) -> None:
    """Refuse quantized rows and a shared expert that are not what the kernels take."""
    blocks, inner, shared = bound.get("HB", 0), bound["I2"] // 2, shared_inner(bound)
    if blocks and (blocks != bound["H"] // 128 or bound["act_quant"] != "ue8m0"):
        raise ShapeError(f"MoeExperts: x_scale has {blocks} blocks and act_quant is {bound['act_quant']}")
    if bound.get("S2", 0) and (is_nvfp4(bound) or not takes_shared(inner, shared)):
        form = "NVFP4" if is_nvfp4(bound) else "FP8"
        raise ShapeError(
            f"MoeExperts: a shared expert of width {shared} beside {form} ones of {inner}, kernels take a multiple of "
            "128, at most the width of the others, and FP8"
        )


def _of(weight: str, bound: Mapping[str, Any]) -> dict[str, Buffer | int | float]:
    """Return the arguments for a product's weights; without a shared expert its pointers are never read."""
    shared = f"shared_{weight}" if shared_inner(bound) else weight
    pointers = {"w_ptr": weight, "w_scale_ptr": f"{weight}_scale"}
    pointers |= {"shared_ptr": shared, "shared_scale_ptr": f"{shared}_scale"}
    arguments: dict[str, Buffer | int | float] = {name: Buffer(tensor) for name, tensor in pointers.items()}
    return arguments | {"shared_inner": shared_inner(bound)}


def _narrow_plan(bound: Mapping[str, Any]) -> LaunchPlan:
    tokens, hidden, inner = bound["T"], bound["H"], bound["I2"] // 2
    assignments, workspace = tokens * bound["TOPK"], Workspace()
    rows = _rows(bound, tokens)
    h = workspace.take(2 * rows * inner)
    up: dict[str, Buffer | int | float] = {
        "x_ptr": Buffer("x_codes" if is_quantized(bound) else "x"),
        "x_scale_ptr": Buffer("x_scale" if is_quantized(bound) else "w13_scale"),  # others have none to read
        "ids_ptr": Buffer("expert_ids"),
        "h_ptr": h,
        "num_assignments": assignments,
    }
    down: dict[str, Buffer | int | float] = {
        "h_ptr": h,
        "ids_ptr": Buffer("expert_ids"),
        "weight_ptr": Buffer("expert_weights"),
        "y_ptr": Buffer("y"),
    }
    up_name = _narrow("up", bound, in_place=quantizes(bound))
    launches = (
        Launch(up_name, (rows, inner // NARROW_ROWS, 1), up | _of("w13", bound)),
        Launch(_narrow("down", bound), (hidden // NARROW_ROWS, tokens, 1), down | _of("w2", bound)),
    )
    return LaunchPlan(launches, workspace.size)


def _slice_plan(bound: Mapping[str, Any], first: int, tokens: int, sm: int, workspace: Workspace) -> list[Launch]:
    hidden, inner, top_k, experts = bound["H"], bound["I2"] // 2, bound["TOPK"], bound["E"]
    assignments = tokens * top_k
    tile = choose_tile(assignments, experts, sm, nvfp4=is_nvfp4(bound))
    max_tiles = cdiv(assignments, tile.block_m) + min(experts, assignments)
    scratch = _scratch(bound, tokens, workspace)
    runs = cdiv(assignments, CHUNK)
    counting: dict[str, Buffer | int | float] = {
        "ids_ptr": Buffer("expert_ids", 4 * first * top_k),
        "count_ptr": scratch.counts,
        "num_assignments": assignments,
    }
    placing: dict[str, Buffer | int | float] = {
        "order_ptr": scratch.order,
        "place_ptr": scratch.place,
        "tile_ptr": scratch.tiles,
        "max_tiles": max_tiles,
        "block_m": tile.block_m,
    }
    shared_tiles = cdiv(tokens, tile.block_m) if shared_inner(bound) else 0
    launches = [Launch("count", (runs, 1, 1), counting)] if runs > 1 else []
    launches.append(Launch("place", (runs, 1, 1), counting | placing))
    x, x_scale = Buffer("x", 2 * first * hidden), Buffer("w13_scale")  # unquantized rows have no scales to read
    if is_quantized(bound):
        x, x_scale = Buffer("x_codes", first * hidden), Buffer("x_scale", 4 * first * (hidden // 128))
    elif quantizes(bound):
        launch, x, x_scale = quantize(x, tokens, hidden, workspace)
        launches.append(launch)
    up: dict[str, Buffer | int | float] = {
        "x_ptr": x,
        "x_scale_ptr": x_scale,
        "h_ptr": scratch.h,
        "h_scale_ptr": scratch.h_scale,
        "order_ptr": scratch.order,
        "tile_ptr": scratch.tiles,
        "max_tiles": max_tiles,
        "num_assignments": assignments,
    }
    grid = max_tiles + shared_tiles, inner // 128, 1
    launches.append(Launch(_product("up", tile, bound), grid, up | _of("w13", bound)))
    down: dict[str, Buffer | int | float] = {
        "h_ptr": scratch.h,
        "h_scale_ptr": scratch.h_scale,
        "out_ptr": scratch.out,
        "tile_ptr": scratch.tiles,
        "max_tiles": max_tiles,
        "num_assignments": assignments,
    }
    grid = max_tiles + shared_tiles, hidden // 128, 1
    launches.append(Launch(_product("down", tile, bound), grid, down | _of("w2", bound)))
    combine: dict[str, Buffer | int | float] = {
        "out_ptr": scratch.out,
        "place_ptr": scratch.place,
        "weight_ptr": Buffer("expert_weights", 4 * first * top_k),
        "y_ptr": Buffer("y", 4 * first * hidden),
        "shared_inner": shared_inner(bound),
    }
    launches.append(Launch("combine", (tokens, cdiv(hidden, COMBINE_BLOCK), 1), combine))
    return launches
