"""`MoeExperts` as the rest of the tree knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from seekforge.formats.quantization.nvfp4 import row_bytes
from seekforge.plugins.linear_tile import FEW_FEATURES
from seekforge.plugins.moe_experts.spec import FOLDED, SPEC
from seekforge.plugins.operator import FoldedForm, KernelForm, Operator, Products, RankModel, Step, Taps

if TYPE_CHECKING:
    from seekforge.formats.checkpoint.model_config import ModelConfig

_NARROW = "bytes are widened by hand; smaller tiles spill more"
_TWO = "gate and up keep two [128, 128] sums; 64 rows have no stack but read the weights twice as often"


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    return {
        "E": model.sizes.n_routed_experts,
        "TOPK": model.config.num_experts_per_tok,
        "H": model.config.hidden_size,
        "I2": 2 * model.sizes.moe_intermediate_size,
        "W13": row_bytes(model.config.hidden_size) if model.nvfp4_experts else model.config.hidden_size,
        "act_quant": model.numerics["act_quant"],
    }


def step_sizes(model: RankModel, step: Step) -> list[dict[str, Any]]:
    """Return the sizes of a step."""
    return [{"T": step.expert_tokens}]


def flops(shapes: Mapping[str, Sequence[int]], config: ModelConfig, keys: int) -> float:
    """Return the FLOPs of the experts that one token chooses; of a rank that has some of them, in the mean."""
    per_expert = 1.5 * shapes["w13"][1] * shapes["w2"][1]  # rows of gate, up and hidden size: rows may be NVFP4
    return 2.0 * config.num_experts_per_tok * per_expert * shapes["w13"][0] / config.n_routed_experts


def in_plugin(attrs: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Literal["fp8", "bf16"]:
    """Return the dtype in which kernels multiply: BF16 unquantized rows and NVFP4 weights, which FP8 does not hold."""
    is_nvfp4 = shapes["w13"][2] != shapes["w2"][1]
    return "bf16" if is_nvfp4 or attrs["act_quant"] != "ue8m0" else "fp8"


OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.moe_experts.function:body",
    inlined_limits=(),
    inlined_weights="int8",  # the body has a loop, and TensorRT takes no float8 in one
    inlined_scratch=None,
    folded=FoldedForm(
        op_type=FOLDED,
        body="seekforge.plugins.moe_experts.function:folded_body",
        quantized="QMoE",
        native=True,
    ),
    native=False,
    products=Products(
        flops=flops,
        in_plugin=in_plugin,
        inlined="bf16",
    ),
    taps=Taps(inputs={}, outputs={"y": "routed"}),
    kernels=KernelForm(
        launch="seekforge.plugins.moe_experts.launch",
        cost="seekforge.plugins.moe_experts.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={
            ("up-64", 80): (88, _NARROW),
            ("up-128", 90): (64, _TWO),
            ("up-128", 100): (136, _TWO),
            ("up-128", 103): (136, _TWO),
        },
        known_mma_sync={(f"narrow-{name}", sm): FEW_FEATURES for name in ("up", "down") for sm in (90, 100, 103)},
        libraries={},
    ),
)
