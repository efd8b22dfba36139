"""Launches of `MoeRoute`: one kernel over blocks of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import between, check_rules, power_of_two, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Variant, next_power_of_two
from seekforge.plugins.operator import cdiv

STATICS: Final = ("E", "n_group", "topk_group", "top_k", "norm")
RULES: Final = (
    rule("n_routed_experts", "E", power_of_two(16, 1024)),
    rule("n_group", "n_group", power_of_two(1, 512)),
    rule("num_experts_per_tok", "top_k", between(1, 16)),
)
NOTES: Final = ("two experts or more in each group; topk_group groups hold at least num_experts_per_tok",)
#: Tokens per program.
ROWS: Final = 4


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernel cannot do."""
    experts, groups, top_k = statics["E"], statics["n_group"], statics["top_k"]
    check_rules("MoeRoute", RULES, statics)
    if groups > experts // 2:
        raise ShapeError(f"MoeRoute: n_group is {groups}, {experts} experts make at most {experts // 2}")
    if not 1 <= statics["topk_group"] <= groups or top_k > statics["topk_group"] * (experts // groups):
        raise ShapeError(
            f"MoeRoute: num_experts_per_tok is {top_k}, topk_group {statics['topk_group']} of {groups} groups of "
            f"{experts // groups} experts has fewer"
        )


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return the one variant."""
    types = {
        "logits_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "ids_ptr": "*i32",
        "weights_ptr": "*fp32",
        "num_tokens": "i32",
        "scale": "fp32",
    }
    constants = {
        "E": statics["E"],
        "GROUPS": statics["n_group"],
        "TOPK_GROUPS": statics["topk_group"],
        "TOP_K": statics["top_k"],
        "K_PAD": next_power_of_two(statics["top_k"]),
        "NORM": statics["norm"],
        "ROWS": ROWS,
    }
    return (Variant("route", "route_kernel", types, constants),)


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """None."""
    return 0


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return one launch over the tokens."""
    tokens = bound["T"]
    if tokens == 0:
        return LaunchPlan(())
    arguments: dict[str, Buffer | int | float] = {
        "logits_ptr": Buffer("logits"),
        "bias_ptr": Buffer("bias"),
        "ids_ptr": Buffer("expert_ids"),
        "weights_ptr": Buffer("expert_weights"),
        "num_tokens": tokens,
        "scale": bound["scale"],
    }
    return LaunchPlan((Launch("route", (cdiv(tokens, ROWS), 1, 1), arguments),))
