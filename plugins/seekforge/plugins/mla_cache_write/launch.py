"""Launches of `MlaCacheWrite`: one kernel over blocks of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import check_rules, one_of, power_of_two, rule
from seekforge.plugins.kernels.launch_plan import Buffer, Launch, LaunchPlan, Variant
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.operator import cdiv

STATICS: Final = ("C", "R", "kv_format", "kv_fp8")
RULES: Final = (
    rule("kv_lora_rank", "C", one_of(128, 256, 512, 1024)),
    rule("qk_rope_head_dim", "R", power_of_two(16, 128)),
)
NOTES: Final = ("cache in bf16 or fp8_ds; fp8_ds needs kv_fp8",)
#: Tokens per program.
ROWS: Final = 4


def check(statics: Mapping[str, Any]) -> None:
    """Refuse what the kernel cannot do."""
    if statics["kv_format"] == "f32":
        raise ShapeError("MlaCacheWrite: kv_format is f32, kernels write bf16 and fp8_ds; f32 caches are for the CPU")
    if statics["kv_format"] == "fp8_ds" and not statics["kv_fp8"]:
        raise ShapeError("MlaCacheWrite: kv_format fp8_ds needs kv_fp8; export with --numerics fp8 or use bf16")
    check_rules("MlaCacheWrite", RULES, statics)


def variants(statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
    """Return the one variant."""
    latent = "*u8" if statics["kv_format"] == "fp8_ds" else "*bf16"
    types = {
        "latent_ptr": latent,
        "c_ptr": "*bf16",
        "k_pe_ptr": "*bf16",
        "slot_ptr": "*i64",
        "num_tokens": "i32",
        "num_slots": "i64",
    }
    constants = {
        "C": statics["C"],
        "R": statics["R"],
        "ROWS": ROWS,
        "KV_BYTES": latent == "*u8",
        "KV_FP8": statics["kv_fp8"],
        "FP8": has_fp8(sm),
    }
    return (Variant("write", "latent_write_kernel", types, constants),)


def workspace_bytes(bound: Mapping[str, Any], sm: int) -> int:
    """None."""
    return 0


def plan(bound: Mapping[str, Any], sm: int) -> LaunchPlan:
    """Return one launch over the tokens."""
    tokens = bound["B"] * bound["Q"]
    if tokens == 0:
        return LaunchPlan(())
    slots = bound["*latent"][0] * (64 if bound["kv_format"] == "fp8_ds" else 1)
    arguments: dict[str, Buffer | int | float] = {
        "latent_ptr": Buffer("latent_cache_out"),
        "c_ptr": Buffer("c"),
        "k_pe_ptr": Buffer("k_pe"),
        "slot_ptr": Buffer("slot_mapping"),
        "num_tokens": tokens,
        "num_slots": slots,
    }
    return LaunchPlan((Launch("write", (cdiv(tokens, ROWS), 1, 1), arguments),))
