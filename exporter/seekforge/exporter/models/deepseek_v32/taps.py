"""The points of a DeepSeek-V3.2 layer that parity looks at (`models.family.Taps`)."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.family import Taps
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
DENSE = ("gate_up", "act")
MOE = ("router_logits", "expert_weights", "routed", "shared_gate_up", "shared_act", "shared")
#: Points of [B, Q, heads, width]; those of `MOE`, and `mlp_norm` before it, are [B·Q, width]; others [B, Q, width].
PER_HEAD = ("q_pe", "q_latent", "index_q", "o_latent")
#: BlockFp8Linear by its weight: (tap of its input, tap of its output).
LINEARS = {
    "self_attn.qkv_a_proj": ("attn_norm", "qkv_a"),
    "self_attn.q_b_proj": ("q_a_norm", "q_b"),
    "self_attn.indexer.wq_b": (None, "wq_b"),
    "self_attn.o_proj": ("o", "attn_out"),
    "mlp.gate_up_proj": ("mlp_norm", "gate_up"),
    "mlp.down_proj": ("act", None),
    "mlp.shared_experts.gate_up_proj": ("mlp_norm", "shared_gate_up"),
    "mlp.shared_experts.down_proj": ("shared_act", "shared"),
}


def width(config: ModelConfig, point: str) -> int:
    """Return how many values a point has per token."""
    heads, latent, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    index_heads, dim, hidden = config.index_n_heads, config.index_head_dim, config.hidden_size
    shared = config.n_shared_experts * config.moe_intermediate_size
    widths = {
        "qkv_a": config.q_lora_rank + dim + latent + rope,
        "q_a_norm": config.q_lora_rank,
        "q_b": heads * config.qk_head_dim,
        "q_pe": heads * rope,
        "q_latent": heads * latent,
        "kv_latent": latent,
        "k_pe": rope,
        "index_k_norm": dim,
        "index_k": dim,
        "wq_b": index_heads * dim,
        "index_q": index_heads * dim,
        "index_w": index_heads,
        "o_latent": heads * latent,
        "o": heads * config.v_head_dim,
        "gate_up": 2 * config.intermediate_size,
        "act": config.intermediate_size,
        "router_logits": config.n_routed_experts,
        "expert_weights": config.num_experts_per_tok,
        "biased_scores": config.n_routed_experts,
        "topk_indices": config.index_topk,
        "expert_ids": config.num_experts_per_tok,
        "shared_gate_up": 2 * shared,
        "shared_act": shared,
    }
    return widths.get(point, hidden)


TAPS: Final = Taps(
    attention=ATTENTION,
    dense=DENSE,
    moe=MOE,
    linears=LINEARS,
    norm="index_k_norm",
    per_head=PER_HEAD,
    required=frozenset({"attn_out", "index_q", "o_latent"}),
    width=width,
)
