"""What launches of `MoeExperts` move and compute, if tokens choose experts evenly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from seekforge.plugins.block_fp8_linear.cost import quantize_work
from seekforge.plugins.cost.work import Load, Work, experts_hit
from seekforge.plugins.kernels.launch_plan import Launch, next_power_of_two
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.linear_tile import PARTS
from seekforge.plugins.moe_experts.launch import (
    CHUNK,
    COUNTS,
    NARROW_ROWS,
    choose_tile,
    is_nvfp4,
    is_quantized,
    shared_inner,
)
from seekforge.plugins.operator import cdiv


@dataclass(frozen=True)
class _Share:
    """What falls to the rank's experts: experts that are hit, assignments to them, and tiles of rows."""

    hit: int
    assignments: int
    tiles: int


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what grouping, quantizing, either product or the sum does, for one slice of tokens."""
    hidden, inner, top_k, experts = bound["H"], bound["I2"] // 2, bound["TOPK"], bound["E"]
    tokens = _tokens(launch, bound)
    if launch.variant == "quantize":
        return quantize_work(launch, tokens, hidden)
    if launch.variant.startswith("narrow"):
        return _narrow(launch, tokens, bound, sm, load)
    nvfp4 = is_nvfp4(bound)
    block_m = choose_tile(tokens * top_k, experts, sm, nvfp4=nvfp4).block_m
    share = _share(tokens, bound, load, block_m)
    if launch.variant in ("count", "place"):
        return _grouping(launch, tokens * top_k, experts, share)
    name = launch.variant.partition("-")[0]
    shared, shared_tokens = shared_inner(bound), tokens if shared_inner(bound) else 0
    if name == "combine":
        return Work(
            read_bytes=2 * (share.assignments + shared_tokens) * hidden + 8 * tokens * top_k,
            written_bytes=4 * tokens * hidden,
            loaded_bytes=2 * (share.assignments + shared_tokens) * hidden,
            programs=math.prod(launch.grid),
        )
    quant = bound["act_quant"] == "ue8m0"
    value = 1 if quant else 2
    products = _factors(bound, sm)
    h_values = share.assignments * inner + shared_tokens * shared
    h_bytes = h_values * value + (4 * (h_values // 128) if quant else 0)
    columns, depth = (inner // 128, hidden) if name == "up" else (hidden // 128, inner)
    shared_columns, shared_depth = (shared // 128, hidden) if name == "up" else (hidden // 128, shared)
    both = 2 if name == "up" else 1  # gate and up
    row_bytes = depth * bound["W13"] // hidden  # of a weight's row
    weights = share.hit * both * (columns * 128 * row_bytes + 4 * columns * (depth // 128))
    weights += both * (hidden * shared + 4 * (hidden // 128) * (shared // 128))
    programs, shared_programs = share.tiles * columns, cdiv(shared_tokens, block_m) * shared_columns
    x_rows = tokens if shared_tokens else min(tokens, share.assignments)
    x_bytes = x_rows * (value * hidden + (4 * (hidden // 128) if quant else 0))
    return Work(
        read_bytes=weights + (x_bytes if name == "up" else h_bytes),
        written_bytes=h_bytes if name == "up" else 2 * (share.assignments + shared_tokens) * hidden,
        loaded_bytes=programs * (value * block_m * depth + 128 * both * row_bytes)
        + shared_programs * (value * block_m + 128 * both) * shared_depth,
        programs=programs + shared_programs,
        flops=2 * both * h_values * hidden,
        pass_flops=2 * both * block_m * 128 * 128,
        products=products,
        passes=(depth // 128,),
    )


def _factors(bound: Mapping[str, Any], sm: int) -> Literal["fp8", "f16", "bf16"]:
    """Return the dtype of both factors of a product."""
    if bound["act_quant"] != "ue8m0" or not has_fp8(sm):
        return "bf16"
    return "f16" if is_nvfp4(bound) else "fp8"


def _narrow(launch: Launch, tokens: int, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what a product of few tokens does; programs of assignments to other ranks do nothing."""
    hidden, inner, shared = bound["H"], bound["I2"] // 2, shared_inner(bound)
    share = _share(tokens, bound, load, NARROW_ROWS)
    products = _factors(bound, sm)
    h_values = share.assignments * inner + (tokens * shared if shared else 0)
    value = hidden + 4 * (hidden // 128) if is_quantized(bound) else 2 * hidden  # bytes of a row
    row_bytes, down_bytes = bound["W13"], inner * bound["W13"] // hidden  # of a weight's row
    weights = share.hit * (inner * row_bytes + 4 * (inner // 128) * (hidden // 128))
    weights += shared * hidden + 4 * (shared // 128) * (hidden // 128)
    pass_flops = 2 * NARROW_ROWS * 128 * PARTS
    if launch.variant.startswith("narrow-up"):
        programs = h_values // NARROW_ROWS
        return Work(
            read_bytes=2 * weights + tokens * value,
            written_bytes=2 * h_values,
            loaded_bytes=programs * (2 * NARROW_ROWS * row_bytes + value),  # gate rows, up rows, and the row itself
            programs=programs,
            flops=4 * h_values * hidden,
            pass_flops=2 * pass_flops,
            products=products,
            passes=(cdiv(hidden // 128, PARTS),),
        )
    of_token = cdiv(share.assignments, tokens)
    return Work(
        read_bytes=weights + 2 * h_values + 8 * tokens * bound["TOPK"],
        written_bytes=4 * tokens * hidden,
        loaded_bytes=h_values * (hidden // NARROW_ROWS) * (NARROW_ROWS * down_bytes // inner + 2),
        programs=tokens * (hidden // NARROW_ROWS),
        flops=2 * h_values * hidden,
        pass_flops=pass_flops,
        products=products,
        passes=(of_token * cdiv(inner // 128, PARTS) + cdiv(shared // 128, PARTS),),
    )


def _grouping(launch: Launch, assignments: int, experts: int, share: _Share) -> Work:
    """Return what counting or placing the assignments of a slice does."""
    bins, runs = next_power_of_two(experts), launch.grid[0]
    counts = 4 * runs * bins if runs > 1 else 0
    if launch.variant == "count":
        return Work(read_bytes=4 * assignments, written_bytes=counts, loaded_bytes=4 * assignments, programs=runs)
    rest = int(launch.arguments["max_tiles"]) - share.tiles  # pyright: ignore[reportArgumentType]
    return Work(
        read_bytes=4 * assignments + counts,
        written_bytes=8 * assignments + 12 * share.tiles + 4 * rest,
        # ids once as rows and once as columns, and every program reads all counts
        loaded_bytes=2 * 4 * assignments + runs * counts,
        programs=runs,
        passes=(
            cdiv(runs, COUNTS // bins) if runs > 1 else 0,
            cdiv(share.tiles // share.hit, runs),
            cdiv(rest, runs * CHUNK),
        ),
    )


def _tokens(launch: Launch, bound: Mapping[str, Any]) -> int:
    """Return the tokens of the slice that a launch belongs to."""
    if "num_assignments" in launch.arguments:
        return int(launch.arguments["num_assignments"]) // bound["TOPK"]  # pyright: ignore[reportArgumentType]
    if launch.variant == "quantize":
        return int(launch.arguments["num_rows"])  # pyright: ignore[reportArgumentType]
    return launch.grid[1 if launch.variant.startswith("narrow-down") else 0]


def _share(tokens: int, bound: Mapping[str, Any], load: Load, block_m: int) -> _Share:
    total = max(load.num_experts, bound["E"])
    part = bound["E"] / total
    assignments = round(tokens * bound["TOPK"] * part)
    hit = max(1, min(assignments, round(experts_hit(total, bound["TOPK"], tokens) * part)))
    return _Share(hit, assignments, hit * max(1, cdiv(cdiv(assignments, hit), block_m)))
