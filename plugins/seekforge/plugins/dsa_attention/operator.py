"""`DsaAttention` as the rest of the tree knows it."""

from __future__ import annotations

from typing import Any

from seekforge.plugins.dsa_attention.spec import SPEC
from seekforge.plugins.latent_attention import flops_per_key
from seekforge.plugins.operator import KernelForm, Operator, Products, RankModel, Step, Taps

_NARROW = "bytes are widened by hand; smaller tiles spill more"
_HALF = "scores, weights and tiles of keys beside sums of [64, 256]; by the model worth it, for an SM runs two programs"


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    config = model.config
    return {
        "H": model.sizes.num_attention_heads,
        "C": config.kv_lora_rank,
        "R": config.qk_rope_head_dim,
        "kv_format": model.kv_format,
    }


def step_sizes(model: RankModel, step: Step) -> list[dict[str, Any]]:
    """Return the sizes of a step."""
    if not model.config.index_topk:  # a model without an indexer does not call it
        return []
    return [{"B": step.batch, "Q": step.queries, "MB": step.num_blocks, "TOPK": model.config.index_topk}]


OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.dsa_attention.function:body",
    inlined_limits=(),
    inlined_weights=None,
    inlined_scratch=None,
    folded=None,
    native=True,
    products=Products(
        flops=lambda shapes, config, keys: flops_per_key(config) * min(keys, config.index_topk),
        in_plugin=lambda attrs, shapes: "bf16",
        inlined="f32",  # the body computes in f32, as the reference does
    ),
    taps=Taps(inputs={"q_latent": "q_latent", "q_pe": "q_pe"}, outputs={"o_latent": "o_latent"}),
    kernels=KernelForm(
        launch="seekforge.plugins.dsa_attention.launch",
        cost="seekforge.plugins.dsa_attention.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={
            ("part", 80): (16, _NARROW),
            ("attend", 80): (32, _NARROW),
            ("part", 90): (72, _HALF),
            ("attend", 90): (64, _HALF),
            ("attend-expanded", 90): (40, _HALF),
        },
        known_mma_sync={},
        libraries={},
    ),
)
