"""Launches of `DsaAttention`: attend and combine for few rows, expand and attend for long prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import check_rules
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Variant, Workspace
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.latent_tile import LOG2_E, MAX_PARTS, RULES, WIDTH, choose_cut, take_parts
from seekforge.plugins.operator import cdiv

STATICS: Final = ("H", "C", "R", "kv_format")
NOTES: Final = ("caches in bf16 or fp8_ds", "any number of heads and any index_topk")

#: Most parts that the positions of a row are cut into: what the kernel that combines them loads at once.
MAX_SPLITS: Final = 32
#: SMs of the GPU that parts are counted for, an H100, and steps of keys that a program takes beside its own: to find
#: the end of its row, to load queries, to leave its part to be combined.
_SMS, _STEPS_BESIDE = 132, 2
#: Chosen positions that a program looks at at a time.
_BLOCK_K: Final = 2048
#: Of the kernels that combine parts: the most parts that one loads at once -> columns of a program.
_COMBINE: Final = {4: 512, 8: 256, MAX_SPLITS: 128}
#: Query rows per sequence from which its cache is expanded to bf16 once.
EXPAND_ROWS: Final = 256
_EXPAND_POSITIONS: Final = 4


@functools.lru_cache(maxsize=4096)
def choose_splits(rows: int, programs: int, topk: int, block_n: int, per_sm: int = 1) -> int:
    """Return the parts that each row's positions are cut into, so that the GPU is full and the workspace has room.

    Programs run in waves, and a wave lasts as long as a program: the fewest parts that take the least time.

    Args:
        rows: query rows of the call.
        programs: programs that share a row's heads and columns.
        topk: positions of a row.
        block_n: positions of a step.
        per_sm: programs that an SM runs at a time.
    """
    steps = cdiv(topk, block_n)
    most = max(1, min(MAX_SPLITS, MAX_PARTS // rows, steps))

    def duration(splits: int) -> int:
        return cdiv(rows * programs * splits, _SMS * per_sm) * (cdiv(steps, splits) + _STEPS_BESIDE)

    return min(range(1, most + 1), key=duration)


@functools.lru_cache(maxsize=1024)
def _most_parts(batch: int, queries: int, programs: int, topk: int, block_n: int, per_sm: int) -> int:
    """Return the most parts of all rows together, in a step of at most so many sequences and queries of each."""
    rows = {b * q for b in range(1, batch + 1) for q in range(1, min(queries, MAX_PARTS // b) + 1)}
    splits = {n: choose_splits(n, programs, topk, block_n, per_sm) for n in rows}
    return max((n * parts for n, parts in splits.items() if parts > 1), default=0)


def _combine(splits: int, c: int) -> tuple[str, int]:
    """Return the kernel that combines so many parts of c columns, and the columns of its programs."""
    most = min(one for one in _COMBINE if splits <= one)
    return f"combine-{most}", min(c, _COMBINE[most])


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernels cannot do."""
    if statics["kv_format"] == "f32":
        raise ShapeError("DsaAttention: kv_format is f32, kernels read bf16 and fp8_ds; f32 caches are for the CPU")
    check_rules("DsaAttention", RULES, statics)


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return attend (whole and split), combine, and for bytes expand and attend on what was expanded."""
    from_bytes = statics["kv_format"] == "fp8_ds"
    sizes = {name: statics[name] for name in ("H", "C", "R")}

    def attend(name: str, *, bytes_: bool, partial: bool, linear: bool) -> Variant:
        cut = choose_cut(statics["H"], statics["C"], sm, from_bytes=bytes_)
        tile = cut.tile
        width = WIDTH if cut.columns < statics["C"] else cut.columns
        types = {
            "q_ptr": "*bf16",
            "q_pe_ptr": "*bf16",
            "cache_ptr": "*u8" if bytes_ else "*bf16",
            "table_ptr": "*i32",
            "topk_ptr": "*i32",
            "out_ptr": "*fp32" if partial else "*bf16",
            "lse_ptr": "*fp32",
            "num_slots": "i64",
            "num_blocks": "i32",
            "TOPK": "i32",
            "first_row": "i32",
            "rows_per_sequence": "i32",
            "splits": "i32",
            "scale_log2": "fp32",
        }
        constants = sizes | {
            "BLOCK_H": tile.block_h,
            "BLOCK_N": tile.block_n,
            "BYTES": bytes_,
            "FP8": has_fp8(sm),
            "PARTIAL": partial,
            "LINEAR": linear,
            "BLOCK_K": _BLOCK_K,
            "COLUMNS": cut.columns,
            "WIDTH": width,
            # beside wgmma, registers are shorter without the scales than with products of them
            "APART": bytes_ and width == WIDTH and not (sm == 90 and tile.block_h == 64),
        }
        return Variant(
            name, "attend_kernel", types, constants,
            num_warps=tile.num_warps, num_stages=tile.num_stages, main_loop=True,
        )  # fmt: skip

    result = [
        attend(name, bytes_=from_bytes, partial=p, linear=False) for name, p in (("attend", False), ("part", True))
    ]
    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32"}
    for splits in _COMBINE:
        name, columns = _combine(splits, statics["C"])
        constants = {"H": statics["H"], "C": statics["C"], "SPLITS": splits, "BLOCK_C": columns}
        result.append(Variant(name, "combine_kernel", types, constants))
    if from_bytes:
        types = {
            "cache_ptr": "*u8",
            "table_ptr": "*i32",
            "out_ptr": "*bf16",
            "num_slots": "i64",
            "num_blocks": "i32",
            "sequence": "i32",
        }
        constants = {"C": statics["C"], "R": statics["R"], "ROWS": _EXPAND_POSITIONS, "FP8": has_fp8(sm)}
        result.append(Variant("expand", "expand_kernel", types, constants))
        result.append(attend("attend-expanded", bytes_=False, partial=False, linear=True))
    return tuple(result)


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """Return scratch for the parts of few rows, or for one expanded sequence of a long prompt."""
    from_bytes = bound["kv_format"] == "fp8_ds"
    expands = from_bytes and bound["Q"] >= EXPAND_ROWS
    queries = min(bound["Q"], EXPAND_ROWS - 1) if from_bytes else bound["Q"]
    workspace = Workspace()
    sizes = min(bound["B"], MAX_PARTS), min(queries, MAX_PARTS), *_cut(bound, sm)
    take_parts(bound, _most_parts(*sizes), workspace)
    expanded = Workspace()
    if expands:
        _take_expanded(bound, expanded)
    return max(workspace.size, expanded.size)


def _cut(bound: Mapping[str, Any], sm: int) -> tuple[int, int, int, int]:
    """Return the programs that share a row, its positions, those of a step, and the programs of an SM."""
    cut = choose_cut(bound["H"], bound["C"], sm, from_bytes=bound["kv_format"] == "fp8_ds")
    return cut.programs(bound["H"], bound["C"]), bound["TOPK"], cut.tile.block_n, cut.per_sm


def _take_expanded(bound: Mapping[str, Any], workspace: Workspace) -> Buffer:
    return workspace.take(2 * bound["MB"] * 64 * (bound["C"] + bound["R"]))


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return the launches: one or two for all rows, or two per sequence of a long prompt."""
    b, q, heads = (bound[name] for name in ("B", "Q", "H"))
    rows, topk = b * q, bound["TOPK"]
    if rows == 0 or heads == 0:
        return LaunchPlan(())
    from_bytes = bound["kv_format"] == "fp8_ds"
    slots = bound["*latent"][0] * (64 if from_bytes else 1)
    common: dict[str, Buffer | int | float] = {
        "cache_ptr": Buffer("latent_cache"),
        "table_ptr": Buffer("block_table"),
        "num_slots": slots,
        "num_blocks": bound["MB"],
        "TOPK": topk,
        "first_row": 0,
        "rows_per_sequence": q,
        "scale_log2": bound["scale"] * LOG2_E,
    }
    if from_bytes and q >= EXPAND_ROWS:
        return _prompt_plan(bound, common, slots=slots, sm=sm)
    cut = _cut(bound, sm)
    splits = choose_splits(rows, *cut)
    part, lse = Buffer("o_latent"), Buffer("o_latent")  # lse is not written by the whole variant
    workspace = Workspace()
    if splits > 1:
        part, lse = take_parts(bound, rows * splits, workspace)
    rest: dict[str, Buffer | int | float] = {
        "q_ptr": Buffer("q_latent"),
        "q_pe_ptr": Buffer("q_pe"),
        "topk_ptr": Buffer("topk_indices"),
        "out_ptr": part,
        "lse_ptr": lse,
        "splits": splits,
    }
    launches = [Launch("part" if splits > 1 else "attend", (rows, cut[0], splits), common | rest)]
    if splits > 1:
        arguments: dict[str, Buffer | int | float] = {
            "part_ptr": part,
            "lse_ptr": lse,
            "out_ptr": Buffer("o_latent"),
            "splits": splits,
        }
        name, columns = _combine(splits, bound["C"])
        launches.append(Launch(name, (rows, heads, bound["C"] // columns), arguments))
    return LaunchPlan(tuple(launches), workspace.size)


def _prompt_plan(
    bound: Mapping[str, Any], common: Mapping[str, Buffer | int | float], *, slots: int, sm: int
) -> LaunchPlan:
    b, q, heads = (bound[name] for name in ("B", "Q", "H"))
    num_blocks = bound["MB"]
    workspace = Workspace()
    expanded = _take_expanded(bound, workspace)
    programs = choose_cut(heads, bound["C"], sm, from_bytes=False).programs(heads, bound["C"])
    launches = []
    for i in range(b):
        arguments: dict[str, Buffer | int | float] = {
            "cache_ptr": common["cache_ptr"],
            "table_ptr": common["table_ptr"],
            "out_ptr": expanded,
            "num_slots": slots,
            "num_blocks": num_blocks,
            "sequence": i,
        }
        launches.append(Launch("expand", (cdiv(num_blocks * 64, _EXPAND_POSITIONS), 1, 1), arguments))
        rest: dict[str, Buffer | int | float] = {
            "q_ptr": Buffer("q_latent"),
            "q_pe_ptr": Buffer("q_pe"),
            "cache_ptr": expanded,
            "topk_ptr": Buffer("topk_indices"),
            "out_ptr": Buffer("o_latent"),
            "lse_ptr": Buffer("o_latent"),
            "num_slots": num_blocks * 64,
            "first_row": q * i,
            "splits": 1,
        }
        launches.append(Launch("attend-expanded", (q, programs, 1), dict(common) | rest))
    return LaunchPlan(tuple(launches), workspace.size)
