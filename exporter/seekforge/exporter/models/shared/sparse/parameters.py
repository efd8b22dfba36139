"""The table of parameters of models with sparse attention: what all families have, and indexers (spec §2.2, §2.3)."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.parameters import Parameter, Tensor
from seekforge.exporter.models.shared import parameters as shared
from seekforge.exporter.models.shared.parameters import linear, mla_parameters, mla_tensors, value
from seekforge.formats.checkpoint.model_config import LayerKind, ModelConfig
from seekforge.plugins.registry import BF16_LINEAR

#: Kind of weight -> the smallest codes that an int4 engine stores it in. wq_b alone in int4 costs a KL of 0.02; of the
#: keys that are chosen otherwise, most are so by it and by qkv_a_proj. With these two and lm_head in int8 the KL is
#: 0.09. The choice hangs on the head weights too, which are small and stay.
CODES: Final = {**shared.CODES, "wq_b": "int8", "weights_proj": "f32"}


# --- checkpoint -----------------------------------------------------------------------------------------------


def layer_tensors(config: ModelConfig, layer: int) -> tuple[Tensor, ...]:
    """Return the tensors of a layer in a checkpoint's order, the MTP layer's further ones included."""
    return shared.layer_tensors(config, layer, attention=_attention_tensors(config, layer))


def _attention_tensors(config: ModelConfig, layer: int) -> tuple[Tensor, ...]:
    return (*mla_tensors(config), *(_indexer_tensors(config) if config.has_indexer(layer) else ()))


def _indexer_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Return the tensors of the lightning indexer."""
    heads, dim = config.index_n_heads, config.index_head_dim
    return (
        Tensor("self_attn.indexer.wq_b.weight", (heads * dim, config.q_lora_rank), draw="paired_heads"),
        Tensor("self_attn.indexer.wk.weight", (dim, config.hidden_size)),
        Tensor("self_attn.indexer.k_norm.weight", (dim,), "f32", active=0, draw="norm"),
        Tensor("self_attn.indexer.k_norm.bias", (dim,), "f32", active=0, draw="shift"),
        Tensor("self_attn.indexer.weights_proj.weight", (heads, config.hidden_size), "bf16", draw="plain"),
    )


# --- program --------------------------------------------------------------------------------------------------


def layer_parameters(kind: LayerKind) -> tuple[Parameter, ...]:
    """Return the parameters of a layer."""
    return shared.layer_parameters(kind, attention=_attention_parameters(kind.has_indexer))


def _attention_parameters(has_indexer: bool) -> tuple[Parameter, ...]:
    """Return the parameters of a layer's attention."""
    if not has_indexer:
        return mla_parameters("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    return (
        *mla_parameters("self_attn.q_a_proj", "self_attn.indexer.wk", "self_attn.kv_a_proj_with_mqa"),
        linear(
            "self_attn.indexer.wq_b",
            ("self_attn.indexer.wq_b",),
            "the indexer's query projection",
            norm=shared.QUERY_NORM,
            beside="self_attn.q_b_proj",
        ),
        value("self_attn.indexer.k_norm.weight", "the norm of the indexer's keys"),
        value("self_attn.indexer.k_norm.bias", "the norm of the indexer's keys"),
        value("self_attn.indexer.weights_proj.weight", "the indexer's head weights", op=BF16_LINEAR),
    )


# --- caches ---------------------------------------------------------------------------------------------------


def caches(config: ModelConfig, layer: int) -> dict[str, int]:
    """Return kind of paged cache of a layer -> values that one token has in it."""
    index_cache = {"index_cache": config.index_head_dim} if config.has_indexer(layer) else {}
    return {"latent_cache": config.latent_dim} | index_cache
