"""`MlaAttention` as the rest of the tree knows it."""

from __future__ import annotations

from typing import Any

from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.latent_attention import flops_per_key
from seekforge.plugins.mla_attention.spec import SPEC
from seekforge.plugins.operator import KernelForm, Operator, Products, RankModel, Step, Taps

_HALF = "scores and weights beside sums of [64, 256]; none of it in the loop"


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    config = model.config
    return {
        "H": model.sizes.num_attention_heads,
        "C": config.kv_lora_rank,
        "R": config.qk_rope_head_dim,
        # a model with an indexer, whose caches may be FP8, does not call it
        "kv_format": "bf16" if config.index_topk else model.kv_format,
    }


def step_sizes(model: RankModel, step: Step) -> list[dict[str, Any]]:
    """Return the sizes of a step."""
    if model.config.index_topk:  # a model with an indexer does not call it
        return []
    return [{"B": step.batch, "Q": step.queries, "MB": step.num_blocks}]


def inlined_scratch(model: RankModel, step: Step) -> int:
    """Return bytes for one row of queries: three times the cached rows, and once the scores of all heads, in f32.

    That is what TensorRT-RTX 1.7.1 says of `tiny-v3` with 16 sequences of 65,536 positions: 2.28 GiB.
    """
    if model.config.index_topk:  # a model with an indexer does not call it
        return 0
    values = 3 * model.config.latent_dim + model.sizes.num_attention_heads
    return step.batch * step.num_blocks * BLOCK_SIZE * values * 4


OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.mla_attention.function:body",
    inlined_limits=(),
    inlined_weights=None,
    inlined_scratch=inlined_scratch,
    folded=None,
    native=True,
    products=Products(
        flops=lambda shapes, config, keys: flops_per_key(config) * keys,
        in_plugin=lambda attrs, shapes: "bf16",
        inlined="f32",  # the body computes in f32, as the reference does
    ),
    taps=Taps(inputs={"q_latent": "q_latent", "q_pe": "q_pe"}, outputs={"o_latent": "o_latent"}),
    kernels=KernelForm(
        launch="seekforge.plugins.mla_attention.launch",
        cost="seekforge.plugins.mla_attention.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={("attend", 90): (40, _HALF)},
        known_mma_sync={},
        libraries={},
    ),
)
