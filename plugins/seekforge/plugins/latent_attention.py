"""What operators that attend in the latent space have in common, whichever keys they look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seekforge.formats.checkpoint.model_config import ModelConfig


def flops_per_key(config: ModelConfig) -> float:
    """Return the FLOPs of one layer for each key that a token attends to (spec §9.2)."""
    return 2.0 * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
