"""The points of a layer that parity looks at in every family (`models.family.Taps`): those of attention and MLP."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.family import Division
from seekforge.formats.checkpoint.model_config import ModelConfig

DENSE = ("gate_up", "act")
MOE = ("router_logits", "expert_weights", "routed", "shared_gate_up", "shared_act", "shared")
#: Points of [B, Q, heads, width]; those of `MOE`, and `mlp_norm` before it, are [B·Q, width]; others [B, Q, width].
PER_HEAD = ("q_pe", "q_latent", "o_latent")
#: BlockFp8Linear by its weight: (tap of its input, tap of its output).
LINEARS = {
    "self_attn.qkv_a_proj": ("attn_norm", "qkv_a"),
    "self_attn.q_b_proj": ("q_a_norm", "q_b"),
    "self_attn.o_proj": ("o", "attn_out"),
    "mlp.gate_up_proj": ("mlp_norm", "gate_up"),
    "mlp.down_proj": ("act", None),
    "mlp.shared_experts.gate_up_proj": ("mlp_norm", "shared_gate_up"),
    "mlp.shared_experts.down_proj": ("shared_act", "shared"),
}
#: How tensor-parallel ranks divide points.
DIVIDED: Final[dict[str, Division]] = {
    "q_b": "parts",
    "q_pe": "parts",
    "q_latent": "parts",
    "o_latent": "parts",
    "o": "parts",
    "attn_out": "sum",
    "gate_up": "pairs",
    "act": "parts",
    "routed": "sum",
    "shared_gate_up": "pairs",
    "shared_act": "parts",
    "shared": "sum",
}
#: The norms that read what layers hand over: that of a layer, and that behind the last one.
ENTRY_NORM, FINAL_NORM = "input_layernorm", "norm"
#: What every layer's graph shows.
REQUIRED = frozenset({"attn_out", "o_latent"})


def width(config: ModelConfig, point: str) -> int:
    """Return how many values a point has per token."""
    heads, latent, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    shared = config.n_shared_experts * config.moe_intermediate_size
    widths = {
        "qkv_a": config.q_lora_rank + latent + rope,
        "q_a_norm": config.q_lora_rank,
        "q_b": heads * config.qk_head_dim,
        "q_pe": heads * rope,
        "q_latent": heads * latent,
        "kv_latent": latent,
        "k_pe": rope,
        "o_latent": heads * latent,
        "o": heads * config.v_head_dim,
        "gate_up": 2 * config.intermediate_size,
        "act": config.intermediate_size,
        "router_logits": config.n_routed_experts,
        "expert_weights": config.num_experts_per_tok,
        "biased_scores": config.n_routed_experts,
        "expert_ids": config.num_experts_per_tok,
        "shared_gate_up": 2 * shared,
        "shared_act": shared,
    }
    return widths.get(point, config.hidden_size)
