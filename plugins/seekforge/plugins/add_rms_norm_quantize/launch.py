"""Launches of `AddRmsNormQuantize`: one program for each row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import between, check_rules, multiple, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Variant
from seekforge.plugins.kernels.sm_limits import has_fp8

STATICS: Final = ()
#: Blocks of 128 that a program of each variant holds -> its warps.
_BLOCKS: Final = {4: 4, 16: 4, 64: 8, 128: 16}
#: Widest row.
MOST: Final = 128 * max(_BLOCKS)
RULES: Final = (
    rule("width of a norm", "H", multiple(128, "one FP8 block")),
    rule("width of a norm", "H", between(128, MOST)),
)
NOTES: Final = ()


def check(statics: Mapping[str, Any]) -> None:
    """Nothing is fixed at compile time, so nothing can be refused."""


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return the kernel for every number of blocks."""
    types = {
        "x_ptr": "*bf16",
        "residual_ptr": "*bf16",
        "weight_ptr": "*fp32",
        "total_ptr": "*bf16",
        "y_ptr": "*bf16",
        "codes_ptr": "*u8",
        "scale_ptr": "*fp32",
        "H": "i32",
        "adds": "i32",
        "epsilon": "fp32",
    }
    return tuple(
        Variant(
            f"norm-{blocks}", "norm_kernel", types, {"BLOCKS": blocks, "FP8": has_fp8(sm)}, aligned=("H",),
            num_warps=warps,
        )
        for blocks, warps in _BLOCKS.items()
    )  # fmt: skip


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """None."""
    return 0


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return one launch over the rows."""
    rows, width, added = math.prod(bound["*lead"]), bound["H"], bound["R"]
    check_rules("AddRmsNormQuantize", RULES, bound)
    if added not in (0, width):
        raise ShapeError(f"AddRmsNormQuantize: rows of residual have {added} values, those of x {width}")
    if rows == 0:
        return LaunchPlan(())
    arguments: dict[str, Buffer | int | float] = {
        "x_ptr": Buffer("x"),
        "residual_ptr": Buffer("residual" if added else "x"),
        "weight_ptr": Buffer("weight"),
        "total_ptr": Buffer("total"),
        "y_ptr": Buffer("y"),
        "codes_ptr": Buffer("codes"),
        "scale_ptr": Buffer("scale"),
        "H": width,
        "adds": int(added > 0),
        "epsilon": bound["epsilon"],
    }
    blocks = min(one for one in _BLOCKS if 128 * one >= width)
    return LaunchPlan((Launch(f"norm-{blocks}", (rows, 1, 1), arguments),))
