"""The table of DeepSeek-V3's parameters: that of DeepSeek-V3.2 without the indexer."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.deepseek_v32 import parameters as v32
from seekforge.exporter.models.deepseek_v32.parameters import PLACES, end_parameters, end_tensors, mtp_parameters
from seekforge.exporter.models.parameters import Parameter, Tensor
from seekforge.formats.checkpoint.model_config import ModelConfig

__all__ = [
    "CODES",
    "PLACES",
    "caches",
    "end_parameters",
    "end_tensors",
    "layer_parameters",
    "layer_tensors",
    "mtp_parameters",
]

#: Kind of weight -> the smallest codes that an int4 engine stores it in; as in DeepSeek-V3.2, where they were measured.
CODES: Final = {kind: codes for kind, codes in v32.CODES.items() if kind not in ("wq_b", "weights_proj")}


def layer_tensors(config: ModelConfig, layer: int) -> tuple[Tensor, ...]:
    """Return the tensors of a layer in a checkpoint's order, the MTP layer's further ones included."""
    return v32.layer_tensors(config, layer, attention=v32.mla_tensors)


def layer_parameters(is_moe: bool) -> tuple[Parameter, ...]:
    """Return the parameters of a layer."""
    return v32.layer_parameters(is_moe, attention=_attention_parameters)


def _attention_parameters() -> tuple[Parameter, ...]:
    return v32.mla_parameters("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")


def caches(config: ModelConfig) -> dict[str, int]:
    """Return kind of paged cache of a layer -> values that one token has in it."""
    return {"latent_cache": config.latent_dim}
