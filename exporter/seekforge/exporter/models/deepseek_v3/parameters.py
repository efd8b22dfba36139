"""The table of DeepSeek-V3's parameters: what all families have, and nothing else."""

from __future__ import annotations

from seekforge.exporter.models.parameters import Parameter, Tensor
from seekforge.exporter.models.shared import parameters as shared
from seekforge.exporter.models.shared.parameters import mla_parameters, mla_tensors
from seekforge.formats.checkpoint.model_config import LayerKind, ModelConfig


def layer_tensors(config: ModelConfig, layer: int) -> tuple[Tensor, ...]:
    """Return the tensors of a layer in a checkpoint's order, the MTP layer's further ones included."""
    return shared.layer_tensors(config, layer, attention=mla_tensors(config))


def layer_parameters(kind: LayerKind) -> tuple[Parameter, ...]:
    """Return the parameters of a layer."""
    return shared.layer_parameters(kind, attention=_attention_parameters())


def _attention_parameters() -> tuple[Parameter, ...]:
    return mla_parameters("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")


def caches(config: ModelConfig, layer: int) -> dict[str, int]:
    """Return kind of paged cache of a layer -> values that one token has in it."""
    return {"latent_cache": config.latent_dim}
