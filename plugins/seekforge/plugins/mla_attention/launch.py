"""Launches of `MlaAttention`: attend alone where rows are many, else attend to parts of the positions and combine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.kernels.constraints import check_rules
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Variant, Workspace
from seekforge.plugins.latent_tile import LOG2_E, MAX_PARTS, RULES, WIDTH, choose_cut, most_parts, take_parts
from seekforge.plugins.operator import cdiv

STATICS: Final = ("H", "C", "R", "kv_format")
NOTES: Final = ("cache in bf16", "any number of heads")

#: Parts that are combined at a time.
COMBINED: Final = 16


def choose_splits(rows: int, num_blocks: int, block_n: int) -> int:
    """Return the parts that each row's positions are cut into: those of all rows fill the GPU and fit the workspace."""
    return max(1, min(MAX_PARTS // rows, cdiv(num_blocks * BLOCK_SIZE, block_n)))


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernels cannot do."""
    if statics["kv_format"] == "f32":
        raise ShapeError("MlaAttention: kv_format is f32, kernels read bf16; f32 caches are for the CPU")
    if statics["kv_format"] != "bf16":
        raise ShapeError(f"MlaAttention: kv_format is {statics['kv_format']}, kernels read bf16")
    check_rules("MlaAttention", RULES, statics)


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return attend, whole and in parts, and combine."""
    sizes = {name: statics[name] for name in ("H", "C", "R")}
    cut = choose_cut(statics["H"], statics["C"], sm, from_bytes=False)
    tile = cut.tile

    def attend(name: str, *, partial: bool) -> Variant:
        types = {
            "q_ptr": "*bf16",
            "q_pe_ptr": "*bf16",
            "cache_ptr": "*bf16",
            "table_ptr": "*i32",
            "positions_ptr": "*i64",
            "out_ptr": "*fp32" if partial else "*bf16",
            "lse_ptr": "*fp32",
            "num_slots": "i64",
            "num_blocks": "i32",
            "rows_per_sequence": "i32",
            "splits": "i32",
            "scale_log2": "fp32",
        }
        constants = sizes | {"BLOCK_H": tile.block_h, "BLOCK_N": tile.block_n, "PARTIAL": partial}
        constants |= {"COLUMNS": cut.columns, "WIDTH": WIDTH if cut.columns < statics["C"] else cut.columns}
        return Variant(
            name, "attend_kernel", types, constants,
            num_warps=tile.num_warps, num_stages=tile.num_stages, main_loop=True,
        )  # fmt: skip

    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32"}
    constants = {"H": statics["H"], "C": statics["C"], "PARTS": COMBINED}
    combine = Variant("combine", "combine_kernel", types, constants)
    return attend("attend", partial=False), attend("part", partial=True), combine


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """Return scratch for the parts of few rows."""
    block_n = choose_cut(bound["H"], bound["C"], sm, from_bytes=False).tile.block_n
    most_splits = min(MAX_PARTS, cdiv(bound["MB"] * BLOCK_SIZE, block_n))
    workspace = Workspace()
    take_parts(bound, most_parts(bound["B"], bound["Q"], most_splits), workspace)
    return workspace.size


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return one launch, or two of few rows."""
    b, q, heads = (bound[name] for name in ("B", "Q", "H"))
    rows = b * q
    if rows == 0 or heads == 0:
        return LaunchPlan(())
    cut = choose_cut(heads, bound["C"], sm, from_bytes=False)
    splits = choose_splits(rows, bound["MB"], cut.tile.block_n)
    part, lse = Buffer("o_latent"), Buffer("o_latent")  # lse is not written by the whole variant
    workspace = Workspace()
    if splits > 1:
        part, lse = take_parts(bound, rows * splits, workspace)
    arguments: dict[str, Buffer | int | float] = {
        "q_ptr": Buffer("q_latent"),
        "q_pe_ptr": Buffer("q_pe"),
        "cache_ptr": Buffer("latent_cache"),
        "table_ptr": Buffer("block_table"),
        "positions_ptr": Buffer("positions"),
        "out_ptr": part,
        "lse_ptr": lse,
        "num_slots": bound["*latent"][0],
        "num_blocks": bound["MB"],
        "rows_per_sequence": q,
        "splits": splits,
        "scale_log2": bound["scale"] * LOG2_E,
    }
    launches = [Launch("part" if splits > 1 else "attend", (rows, cut.programs(heads, bound["C"]), splits), arguments)]
    if splits > 1:
        arguments = {"part_ptr": part, "lse_ptr": lse, "out_ptr": Buffer("o_latent"), "splits": splits}
        launches.append(Launch("combine", (rows, heads, 1), arguments))
    return LaunchPlan(tuple(launches), workspace.size)
