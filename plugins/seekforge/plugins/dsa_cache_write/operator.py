"""`DsaCacheWrite` as the rest of the tree knows it."""

from __future__ import annotations

from typing import Any

from seekforge.plugins.dsa_cache_write.spec import SPEC
from seekforge.plugins.operator import KernelForm, Operator, RankModel, Step, Taps


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    config, numerics = model.config, model.numerics
    return {
        "C": config.kv_lora_rank,
        "R": config.qk_rope_head_dim,
        "D": config.index_head_dim,
        "kv_format": model.kv_format,
        "index_format": model.kv_format,
        "kv_fp8": numerics["kv_fp8"],
        "indexer_fp8": numerics["indexer_fp8"],
    }


def step_sizes(model: RankModel, step: Step) -> list[dict[str, Any]]:
    """Return the sizes of a step."""
    if not model.config.index_topk:  # a model without an indexer does not call it
        return []
    return [{"B": step.batch, "Q": step.queries}]


OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.dsa_cache_write.function:body",
    inlined_limits=(),
    inlined_weights=None,
    inlined_scratch=None,
    folded=None,
    native=True,
    products=None,
    taps=Taps(inputs={"c": "kv_latent", "k_pe": "k_pe", "index_k": "index_k"}, outputs={}),
    kernels=KernelForm(
        launch="seekforge.plugins.dsa_cache_write.launch",
        cost="seekforge.plugins.dsa_cache_write.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={},
        known_mma_sync={},
        libraries={},
    ),
)
