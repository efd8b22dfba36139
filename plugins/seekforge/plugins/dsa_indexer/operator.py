"""`DsaIndexer` as the rest of the tree knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seekforge.plugins.dsa_indexer.spec import SPEC
from seekforge.plugins.operator import InlinedLimit, KernelForm, Operator, Products, RankModel, Step, Taps

if TYPE_CHECKING:
    from seekforge.formats.checkpoint.model_config import ModelConfig


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return what the kernels are compiled for, and how many keys they pick."""
    config = model.config
    return {
        "Hi": config.index_n_heads,
        "D": config.index_head_dim,
        "index_topk": config.index_topk,
        "indexer_fp8": model.numerics["indexer_fp8"],
        "index_format": model.kv_format,
    }


def step_sizes(model: RankModel, step: Step) -> list[dict[str, Any]]:
    """Return the sizes of a step."""
    if not model.config.index_topk:  # a model without an indexer does not call it
        return []
    return [{"B": step.batch, "Q": step.queries, "MB": step.num_blocks}]


def flops_per_key(config: ModelConfig) -> float:
    """Return the FLOPs of one layer's scores for each key that a token sees (spec §9.2)."""
    return 2.0 * config.index_n_heads * config.index_head_dim


OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.dsa_indexer.function:body",
    inlined_limits=(InlinedLimit("index_topk", 3840, "TensorRT's TopK takes"),),
    inlined_weights=None,
    inlined_scratch=None,
    folded=None,
    native=True,
    products=Products(
        flops=lambda shapes, config, keys: flops_per_key(config) * keys,
        in_plugin=lambda attrs, shapes: "fp8" if attrs["indexer_fp8"] else "bf16",
        inlined="f32",  # the body computes in f32, as the reference does
    ),
    taps=Taps(inputs={"q": "index_q", "w": "index_w"}, outputs={}),
    kernels=KernelForm(
        launch="seekforge.plugins.dsa_indexer.launch",
        cost="seekforge.plugins.dsa_indexer.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={},
        known_mma_sync={},
        libraries={},
    ),
)
