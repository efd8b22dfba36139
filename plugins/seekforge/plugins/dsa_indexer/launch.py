"""Launches of `DsaIndexer`: scores and selection, in slices of rows so that the scores stay bounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import check_rules, exactly, one_of, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Variant, Workspace, most_rows
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
#: Programs that select where rows are few, so that all SMs have work; steps of a row that is worth sharing.
SELECT_PROGRAMS, SHARED_STEPS = 256, 4
#: Counts of a digit: of the first two, and of the last. Programs whose counts of the last are added at a time.
DIGIT_COUNTS, LAST_COUNTS, ADDED_PROGRAMS = 4096, 256, 32


def rows_per_program(queries: int, sm: int) -> int:
    """Return how many query rows of a sequence share a tile of keys: one in decode, four in prefill."""
    # on SM80 four rows of bf16 queries beside keys that are widened by hand do not fit the registers
    return 1 if queries == 1 else 2 if queries <= 8 or not has_fp8(sm) else 4


def pages_per_program(rows: int, num_blocks: int) -> int:
    """Return the pages that a program scores: few while there are few rows, so that all SMs have work."""
    return 4 if rows * num_blocks < 4096 else 16


def programs_per_row(rows: int, length: int) -> int:
    """Return how many programs share the selection of one row; 1 where rows alone have work for all SMs."""
    steps = cdiv(length, SELECT_BLOCK)
    shared = min(steps, SELECT_PROGRAMS // rows)
    return cdiv(steps, cdiv(steps, shared)) if shared > 1 and steps >= SHARED_STEPS else 1


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernels cannot do."""
    if statics["index_format"] == "f32":
        raise ShapeError("DsaIndexer: index_format is f32, kernels read bf16 and fp8_ds; f32 caches are for the CPU")
    if statics["index_format"] == "fp8_ds" and not statics["indexer_fp8"]:
        raise ShapeError("DsaIndexer: index_format fp8_ds needs indexer_fp8; export with --numerics fp8 or use bf16")
    check_rules("DsaIndexer", RULES, statics)


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return scores for one, two and four rows per program, the selection by one program per row, and by several."""
    from_bytes = statics["index_format"] == "fp8_ds"
    types = {
        "q_ptr": "*bf16",
        "w_ptr": "*fp32",
        "cache_ptr": "*u8" if from_bytes else "*bf16",
        "table_ptr": "*i32",
        "position_ptr": "*i64",
        "score_ptr": "*fp32",
        "count_ptr": "*i32",
        "num_slots": "i64",
        "num_blocks": "i32",
        "rows_per_sequence": "i32",
        "first_row": "i32",
        "last_row": "i32",
        "pages": "i32",
        "num_counts": "i32",
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
                ("num_counts",), num_warps=4 if rows * statics["Hi"] <= 64 else 8, num_stages=3, main_loop=True,
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
    types = {
        "score_ptr": "*fp32",
        "position_ptr": "*i64",
        "state_ptr": "*i32",
        "high_ptr": "*i32",
        "middle_ptr": "*i32",
        "low_ptr": "*i32",
        "above_ptr": "*i32",
        "length_limit": "i32",
        "first_row": "i32",
        "span": "i32",
        "TOPK": "i32",
    }
    aligned = ("length_limit", "span")
    for level in range(3):
        constants = {"LEVEL": level, "BLOCK": SELECT_BLOCK}
        result.append(Variant(f"digit-{level}", "digit_kernel", types, constants, aligned, num_warps=8))
    types = {name: kind for name, kind in types.items() if name not in ("high_ptr", "middle_ptr")} | {"out_ptr": "*i32"}
    constants = {"BLOCK": SELECT_BLOCK, "CHUNKS": ADDED_PROGRAMS}
    result.append(Variant("emit", "emit_kernel", types, constants, aligned, num_warps=8))
    return tuple(result)


@dataclass(frozen=True)
class _Scratch:
    """The scores of a slice of rows, and where programs that share them leave what they count."""

    scores: Buffer
    counts: dict[str, Buffer]


def _scratch(rows: int, length: int, workspace: Workspace) -> _Scratch:
    scores = workspace.take(4 * rows * length)
    if programs_per_row(rows, length) == 1:
        return _Scratch(scores, {})
    counts = {
        "state_ptr": workspace.take(4 * 4 * rows),
        "high_ptr": workspace.take(4 * DIGIT_COUNTS * rows),
        "middle_ptr": workspace.take(4 * DIGIT_COUNTS * rows),
        "low_ptr": workspace.take(4 * LAST_COUNTS * SELECT_PROGRAMS),  # of all programs, which are no more
        "above_ptr": workspace.take(4 * SELECT_PROGRAMS),
    }
    return _Scratch(scores, counts)


def _slice_rows(rows: int, length: int) -> int:
    return min(rows, max(1, SCORE_BYTES // (4 * length)))


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """Return scratch for the scores of one slice and for counts; none where no row can see more keys than it takes.

    A slice of a shorter context has more rows, so its scores come as near to `SCORE_BYTES` as those of the longest.
    Rows are shared, and have counts, where they are few: fewer rows may need more than all of them.
    """
    rows, length, topk = bound["B"] * bound["Q"], bound["MB"] * 64, bound["index_topk"]
    if rows == 0 or topk == 0 or length <= topk:
        return 0
    per_slice = _slice_rows(rows, length)
    shorter = SCORE_BYTES // (4 * 64 * (per_slice + 1)) * 64  # the longest context whose slices have a row more
    largest = Workspace()
    if per_slice < rows and shorter > topk:
        largest.take(max(SCORE_BYTES, 4 * length))
    else:
        largest.take(4 * per_slice * length)
    sizes = [largest.size]
    shortest = (max(topk, (SHARED_STEPS - 1) * SELECT_BLOCK) // 64 + 1) * 64  # of the contexts that are shared
    most = max(1, min(SELECT_PROGRAMS // 2, SCORE_BYTES // (4 * shortest)))
    filling = SCORE_BYTES // (4 * 64 * most) * 64  # the longest context of which so many rows fill a slice
    if rows <= most or length < filling:  # else a slice has `most` rows, whatever the axes of the step
        most = most_rows(most, (bound["B"], bound["Q"]))
        filling = SCORE_BYTES // (4 * 64 * most) * 64
    for few, context in ((most, min(length, filling)), (per_slice, length)):
        shared = Workspace()
        if context >= shortest:
            _scratch(few, context, shared)
        sizes.append(shared.size)
    return max(sizes)


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return two launches per slice of rows, five where rows are few; one when none can see more keys than it takes."""
    b, q, num_blocks, topk = bound["B"], bound["Q"], bound["MB"], bound["index_topk"]
    rows, length = b * q, bound["MB"] * 64
    if rows == 0 or topk == 0:
        return LaunchPlan(())
    workspace = Workspace()
    group = rows_per_program(q, sm)
    pages = pages_per_program(rows, num_blocks)
    per_slice = _slice_rows(rows, length)
    # a row that takes all that it sees has no scores
    scratch = _scratch(per_slice, length, workspace) if length > topk else _Scratch(Buffer("topk_indices"), {})
    slots = bound["*index"][0] * (64 if bound["index_format"] == "fp8_ds" else 1)
    launches = []
    for first in range(0, rows, per_slice):
        last = min(rows, first + per_slice)
        if length > topk:
            groups = cdiv(q, group)
            touched = (last - 1) // q - first // q + 1
            arguments: dict[str, Buffer | int | float] = {
                "q_ptr": Buffer("q"),
                "w_ptr": Buffer("w"),
                "cache_ptr": Buffer("index_cache"),
                "table_ptr": Buffer("block_table"),
                "position_ptr": Buffer("positions"),
                "score_ptr": scratch.scores,
                "count_ptr": scratch.counts.get("high_ptr", scratch.scores),
                "num_slots": slots,
                "num_blocks": num_blocks,
                "rows_per_sequence": q,
                "first_row": first,
                "last_row": last,
                "pages": pages,
                "num_counts": DIGIT_COUNTS if scratch.counts else 0,
                "TOPK": topk,
            }
            grid = (touched * groups, cdiv(num_blocks, pages), 1)
            launches.append(Launch(f"scores-{group}", grid, arguments))
        launches += _selection(scratch, first, last, programs_per_row(per_slice, length), length, topk)
    return LaunchPlan(tuple(launches), workspace.size)


def _selection(scratch: _Scratch, first: int, last: int, programs: int, length: int, topk: int) -> list[Launch]:
    """Return the launches that choose among the scores of rows `first` to `last` - 1, each by so many programs."""
    chosen: dict[str, Buffer | int | float] = {
        "score_ptr": scratch.scores,
        "position_ptr": Buffer("positions"),
        "length_limit": length,
        "first_row": first,
        "TOPK": topk,
    }
    out = {"out_ptr": Buffer("topk_indices")}
    if not scratch.counts:
        return [Launch("select", (last - first, 1, 1), chosen | out)]
    span = cdiv(cdiv(length, SELECT_BLOCK), programs) * SELECT_BLOCK
    grid, shared = (last - first, programs, 1), chosen | scratch.counts | {"span": span}
    emitted = {name: value for name, value in shared.items() if name not in ("high_ptr", "middle_ptr")}
    return [*(Launch(f"digit-{level}", grid, shared) for level in range(3)), Launch("emit", grid, emitted | out)]
