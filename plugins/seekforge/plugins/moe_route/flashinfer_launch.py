"""Launches of `MoeRoute` with FlashInfer's top-k: one kernel, a warp for each token. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import between, check_rules, power_of_two, rule
from seekforge.plugins.kernels.launch_plan import Launch, LaunchPlan, Variant
from seekforge.plugins.moe_route import launch
from seekforge.plugins.operator import cdiv

STATICS: Final = launch.STATICS
#: The library keeps the candidates of a lane in registers and sorts them there, all of a token's experts in one warp.
RULES: Final = (
    rule("n_routed_experts", "E", power_of_two(16, 512)),
    rule("n_group", "n_group", power_of_two(1, 32)),
    rule("num_experts_per_tok", "top_k", between(1, 16)),
)
NOTES: Final = (*launch.NOTES, "groups of at most 32 experts, or multiples of it; topk_group at most 16")
#: Tokens per program.
WARPS: Final = 4
VARIANT: Final = "flashinfer"


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernel cannot do, or has not been compiled for."""
    launch.check(statics)
    check_rules("MoeRoute of flashinfer", RULES, statics)
    if statics["topk_group"] > 16:
        raise ShapeError(f"MoeRoute of flashinfer: topk_group is {statics['topk_group']}, kernels take at most 16")


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return the one variant; arguments are those of Triton's."""
    (ours,) = launch.variants(statics, sm)
    constants = {
        "E": statics["E"],
        "GROUPS": statics["n_group"],
        "TOPK_GROUPS": statics["topk_group"],
        "TOP_K": statics["top_k"],
        "NORM": int(statics["norm"]),
        "WARPS": WARPS,
    }
    return (Variant(VARIANT, "route_by_flashinfer", ours.types, constants, num_warps=WARPS, num_stages=1),)


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """None."""
    return 0


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return one launch over the tokens, with the arguments of Triton's."""
    made = launch.plan(bound, sm)
    grid = (cdiv(bound["T"], WARPS), 1, 1)
    return LaunchPlan(tuple(Launch(VARIANT, grid, one.arguments) for one in made.launches))
