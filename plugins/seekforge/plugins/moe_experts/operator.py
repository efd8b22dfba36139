"""`MoeExperts` as the rest of the tree knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization.nvfp4 import row_bytes
from seekforge.plugins.linear_tile import FEW_FEATURES
from seekforge.plugins.moe_experts.spec import FOLDED, SPEC, takes_shared
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


def shared_size(model: RankModel) -> int:
    """Return the rows of the gate and up projection of the shared expert that an engine has as one more expert, or 0.

    It has so where rows come quantized, as a norm gives them, and weights are of one form.
    """
    sizes = model.sizes
    if model.nvfp4_experts or model.numerics["act_quant"] != "ue8m0":
        return 0
    fits = takes_shared(sizes.moe_intermediate_size, sizes.shared_intermediate_size)
    return 2 * sizes.shared_intermediate_size if fits else 0


def step_sizes(model: RankModel, step: Step) -> list[dict[str, Any]]:
    """Return the sizes of a step of an engine: a norm quantizes the rows (`AddRmsNormQuantize`)."""
    blocks = model.config.hidden_size // FP8_BLOCK if model.numerics["act_quant"] == "ue8m0" else 0
    return [{"T": step.expert_tokens, "HB": blocks, "S2": shared_size(model)}]


def flops(shapes: Mapping[str, Sequence[int]], config: ModelConfig, keys: int) -> float:
    """Return the FLOPs of the experts that one token chooses; of a rank that has some of them, in the mean.

    Those of a shared expert that is one more of them come on top.
    """
    hidden = shapes["w2"][1]  # of w13, rows may be NVFP4
    routed = config.num_experts_per_tok * shapes["w13"][1] * shapes["w13"][0] / config.n_routed_experts
    shared = shapes["shared_w13"][0] if "shared_w13" in shapes else 0
    return 2.0 * 1.5 * hidden * (routed + shared)


def in_plugin(attrs: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Literal["fp8", "f16", "bf16"]:
    """Return the dtype of the factors in kernels: BF16 with rows that are not quantized, F16 with NVFP4 weights."""
    is_nvfp4 = shapes["w13"][2] != shapes["w2"][1]
    return "bf16" if attrs["act_quant"] != "ue8m0" else "f16" if is_nvfp4 else "fp8"


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
            ("up-64", 80): (168, _NARROW),
            ("up-128", 90): (16, _TWO),
            ("up-128", 100): (168, _TWO),
            ("up-128", 103): (168, _TWO),
        },
        known_mma_sync={
            (f"narrow-{name}", sm): FEW_FEATURES for name in ("up", "up-quantize", "down") for sm in (90, 100, 103)
        }
        | {
            (f"narrow-{name}", sm): FEW_FEATURES
            for name in ("up-nvfp4", "up-nvfp4-quantize", "down-nvfp4")
            for sm in (100, 103)
        },
        libraries={},
    ),
)
