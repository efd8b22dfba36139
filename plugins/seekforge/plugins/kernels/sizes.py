"""The sizes and attributes that a model fixes for each operator: what its kernels are compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import FP8
from seekforge.formats.weight_recipes import Ranks

#: Cache format of GPU targets unless asked otherwise.
DEFAULT_FORMAT: Final = "fp8_ds"
_FP8: Final = FP8.to_dict()
_ONE_RANK: Final = Ranks()


def operators(
    config: ModelConfig,
    *,
    kv_format: str = DEFAULT_FORMAT,
    numerics: Mapping[str, Any] = _FP8,
    ranks: Ranks = _ONE_RANK,
) -> dict[str, dict[str, Any]]:
    """Return op_type -> the static sizes and attributes of a model, under the symbols of the specs.

    Args:
        config: of the model.
        kv_format: of both caches.
        numerics: fields of `formats.numerics.Numerics`; by default those of the official reference.
        ranks: that share the model; sizes are those of one of them.
    """
    act_quant, kv_fp8, indexer_fp8 = (numerics[name] for name in ("act_quant", "kv_fp8", "indexer_fp8"))
    found: dict[str, dict[str, Any]] = {
        "BlockFp8Linear": {"act_quant": act_quant},
        "Bf16Linear": {},
        "DsaCacheWrite": {
            "C": config.kv_lora_rank,
            "R": config.qk_rope_head_dim,
            "D": config.index_head_dim,
            "kv_format": kv_format,
            "index_format": kv_format,
            "kv_fp8": kv_fp8,
            "indexer_fp8": indexer_fp8,
        },
        "DsaIndexer": {
            "Hi": config.index_n_heads,
            "D": config.index_head_dim,
            "index_topk": config.index_topk,
            "indexer_fp8": indexer_fp8,
            "index_format": kv_format,
        },
        "DsaAttention": {
            "H": config.num_attention_heads // ranks.count,
            "C": config.kv_lora_rank,
            "R": config.qk_rope_head_dim,
            "kv_format": kv_format,
        },
        "MoeRoute": {
            "E": config.n_routed_experts,
            "n_group": config.n_group,
            "topk_group": config.topk_group,
            "top_k": config.num_experts_per_tok,
            "norm": config.norm_topk_prob,
        },
        "MoeExperts": {
            "E": config.n_routed_experts // ranks.ep,
            "TOPK": config.num_experts_per_tok,
            "H": config.hidden_size,
            "I2": 2 * config.moe_intermediate_size // ranks.tp,
            "act_quant": act_quant,
        },
    }
    return {op: found[op] for op in WITH_KERNELS}


#: Operators that have kernels, in the order of the registry.
WITH_KERNELS: Final[tuple[str, ...]] = (
    "BlockFp8Linear",
    "Bf16Linear",
    "DsaCacheWrite",
    "DsaIndexer",
    "DsaAttention",
    "MoeRoute",
    "MoeExperts",
)
