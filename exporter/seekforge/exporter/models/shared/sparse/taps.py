"""The points of a layer with sparse attention that parity looks at: those of every family, and an indexer's."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.family import Taps
from seekforge.exporter.models.shared import taps
from seekforge.formats.checkpoint.model_config import ModelConfig

ATTENTION = (
    "attn_norm",
    "qkv_a",
    "q_a_norm",
    "q_b",
    "q_pe",
    "q_latent",
    "kv_latent",
    "k_pe",
    "index_k_norm",
    "index_k",
    "wq_b",
    "index_q",
    "index_w",
    "o_latent",
    "o",
    "attn_out",
    "mlp_norm",
)


def width(config: ModelConfig, point: str) -> int:
    """Return how many values a point has per token."""
    heads, dim = config.index_n_heads, config.index_head_dim
    widths = {
        "qkv_a": taps.width(config, "qkv_a") + dim,
        "index_k_norm": dim,
        "index_k": dim,
        "wq_b": heads * dim,
        "index_q": heads * dim,
        "index_w": heads,
        "topk_indices": config.index_topk,
    }
    return widths[point] if point in widths else taps.width(config, point)


TAPS: Final = Taps(
    attention=ATTENTION,
    dense=taps.DENSE,
    moe=taps.MOE,
    linears=taps.LINEARS | {"self_attn.indexer.wq_b": (None, "wq_b")},
    norm="index_k_norm",
    entry_norm=taps.ENTRY_NORM,
    final_norm=taps.FINAL_NORM,
    per_head=(*taps.PER_HEAD, "index_q"),
    required=taps.REQUIRED,
    width=width,
    divided=taps.DIVIDED,
)
