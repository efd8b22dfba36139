"""Launches of `DsaIndexer`: scores and selection, in slices of rows so that the scores stay bounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import check_rules, exactly, one_of, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Variant, Workspace
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.operator import cdiv

STATICS: Final = ("Hi", "D", "indexer_fp8", "index_format")
RULES: Final = (
    rule("index_n_heads", "Hi", one_of(16, 32, 64)),
    rule("index_head_dim", "D", exactly(128, "one FP8 block")),
)
NOTES: Final = ("caches in bf16 or fp8_ds (which needs indexer_fp8); any index_topk",)

#: Bytes of scores that one slice of rows may have; one row alone may have more.
SCORE_BYTES: Final = 256 << 20
#: Scores that one step of the selection reads.
SELECT_BLOCK: Final = 2048


def rows_per_program(queries: int, sm: int) -> int:
    """Return how many query rows of a sequence share a tile of keys: one in decode, four in prefill."""
    # on SM80 four rows of bf16 queries beside keys that are widened by hand do not fit the registers
    return 1 if queries == 1 else 2 if queries <= 8 or not has_fp8(sm) else 4


def pages_per_program(rows: int, num_blocks: int) -> int:
    """Return the pages that a program scores: few while there are few rows, so that all SMs have work."""
    return 4 if rows * num_blocks < 4096 else 16


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernels cannot do."""
    if statics["index_format"] == "f32":
        raise ShapeError("DsaIndexer: index_format is f32, kernels read bf16 and fp8_ds; f32 caches are for the CPU")
    if statics["index_format"] == "fp8_ds" and not statics["indexer_fp8"]:
        raise ShapeError("DsaIndexer: index_format fp8_ds needs indexer_fp8; export with --numerics fp8 or use bf16")
    check_rules("DsaIndexer", RULES, statics)


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return scores for one, two and four rows per program, and the selection."""
    from_bytes = statics["index_format"] == "fp8_ds"
    types = {
        "q_ptr": "*bf16",
        "w_ptr": "*fp32",
        "cache_ptr": "*u8" if from_bytes else "*bf16",
        "table_ptr": "*i32",
        "position_ptr": "*i64",
        "score_ptr": "*fp32",
        "num_slots": "i64",
        "num_blocks": "i32",
        "rows_per_sequence": "i32",
        "first_row": "i32",
        "last_row": "i32",
        "pages": "i32",
        "TOPK": "i32",
    }
    result = []
    for rows in (1, 2, 4) if has_fp8(sm) else (1, 2):
        constants = {
            "HEADS": statics["Hi"],
            "ROWS": rows,
            "BYTES": from_bytes,
            "QUANT": statics["indexer_fp8"],
            "FP8": has_fp8(sm),
        }
        result.append(
            Variant(
                f"scores-{rows}", "scores_kernel", types, constants,
                num_warps=4 if rows * statics["Hi"] <= 64 else 8, num_stages=3, main_loop=True,
            )
        )  # fmt: skip
    types = {
        "score_ptr": "*fp32",
        "position_ptr": "*i64",
        "out_ptr": "*i32",
        "length_limit": "i32",
        "first_row": "i32",
        "TOPK": "i32",
    }
    result.append(Variant("select", "select_kernel", types, {"BLOCK": SELECT_BLOCK}, ("length_limit",), num_warps=8))
    return tuple(result)


def _slice_rows(rows: int, length: int) -> int:
    return min(rows, max(1, SCORE_BYTES // (4 * length)))


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """Return scratch for the scores of one slice; none where no row can see more keys than it takes.

    A slice of a shorter context has more rows, so its scores come as near to `SCORE_BYTES` as those of the longest.
    """
    rows, length, topk = bound["B"] * bound["Q"], bound["MB"] * 64, bound["index_topk"]
    if rows == 0 or topk == 0 or length <= topk:
        return 0
    workspace = Workspace()
    per_slice = _slice_rows(rows, length)
    shorter = SCORE_BYTES // (4 * 64 * (per_slice + 1)) * 64  # the longest context whose slices have a row more
    if per_slice < rows and shorter > topk:
        workspace.take(max(SCORE_BYTES, 4 * length))
    else:
        workspace.take(4 * per_slice * length)
    return workspace.size


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return two launches per slice of rows; one when no row can see more keys than it takes."""
    b, q, num_blocks, topk = bound["B"], bound["Q"], bound["MB"], bound["index_topk"]
    rows, length = b * q, bound["MB"] * 64
    if rows == 0 or topk == 0:
        return LaunchPlan(())
    workspace = Workspace()
    group = rows_per_program(q, sm)
    pages = pages_per_program(rows, num_blocks)
    per_slice = _slice_rows(rows, length)
    scores = workspace.take(4 * per_slice * length) if length > topk else Buffer("topk_indices")
    slots = bound["*index"][0] * (64 if bound["index_format"] == "fp8_ds" else 1)
    launches = []
    for first in range(0, rows, per_slice):
        last = min(rows, first + per_slice)
        if length > topk:  # else every row takes all that it sees
            groups = cdiv(q, group)
            touched = (last - 1) // q - first // q + 1
            arguments: dict[str, Buffer | int | float] = {
                "q_ptr": Buffer("q"),
                "w_ptr": Buffer("w"),
                "cache_ptr": Buffer("index_cache"),
                "table_ptr": Buffer("block_table"),
                "position_ptr": Buffer("positions"),
                "score_ptr": scores,
                "num_slots": slots,
                "num_blocks": num_blocks,
                "rows_per_sequence": q,
                "first_row": first,
                "last_row": last,
                "pages": pages,
                "TOPK": topk,
            }
            grid = (touched * groups, cdiv(num_blocks, pages), 1)
            launches.append(Launch(f"scores-{group}", grid, arguments))
        chosen: dict[str, Buffer | int | float] = {
            "score_ptr": scores,
            "position_ptr": Buffer("positions"),
            "out_ptr": Buffer("topk_indices"),
            "length_limit": length,
            "first_row": first,
            "TOPK": topk,
        }
        launches.append(Launch("select", (last - first, 1, 1), chosen))
    return LaunchPlan(tuple(launches), workspace.size)
