"""The points of a DeepSeek-V3 layer that parity looks at: those of every family."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.family import Taps
from seekforge.exporter.models.shared import taps

ATTENTION = (
    "attn_norm",
    "qkv_a",
    "q_a_norm",
    "q_b",
    "q_pe",
    "q_latent",
    "kv_latent",
    "k_pe",
    "o_latent",
    "o",
    "attn_out",
    "mlp_norm",
)

TAPS: Final = Taps(
    attention=ATTENTION,
    dense=taps.DENSE,
    moe=taps.MOE,
    linears=taps.LINEARS,
    norm="",
    entry_norm=taps.ENTRY_NORM,
    final_norm=taps.FINAL_NORM,
    per_head=taps.PER_HEAD,
    required=taps.REQUIRED,
    width=taps.width,
    divided=taps.DIVIDED,
)
