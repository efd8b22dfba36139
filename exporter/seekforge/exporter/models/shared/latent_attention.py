"""Multi-head latent attention without the softmax: its projections, absorbed, and what it caches (spec §3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from seekforge.exporter.models.shared.layers import (
    RmsNorm,
    SumRanks,
    fp8_linear,
    product_per_head,
    rope_interleaved,
    weight,
)
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.step import Step


class LatentAttention(nn.Module):
    """What a family's attention is a subclass of; its `forward` chooses keys and calls the operators.

    Args:
        settings: how it computes.
        layer: its absolute number.
        between: widths of further products of the layer's input, which `qkv_a_proj` holds between q_a_proj and
            kv_a_proj_with_mqa.
    """

    def __init__(self, settings: Settings, layer: int, between: Sequence[int] = ()) -> None:
        super().__init__()
        config = settings.config
        self.settings, self.config, self.layer = settings, config, layer
        self.heads = heads = settings.rank.num_attention_heads
        self.splits = [config.q_lora_rank, *between, config.kv_lora_rank, config.qk_rope_head_dim]
        self.qkv_a_proj = fp8_linear(settings, config.hidden_size, sum(self.splits))
        self.q_a_layernorm = RmsNorm(config.q_lora_rank, config.rms_norm_eps, settings.dtype)
        self.q_b_proj = fp8_linear(settings, config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_layernorm = RmsNorm(config.kv_lora_rank, config.rms_norm_eps, settings.dtype)
        self.w_uk = weight(heads, config.qk_nope_head_dim, config.kv_lora_rank, dtype=settings.dtype)
        self.w_uv = weight(heads, config.v_head_dim, config.kv_lora_rank, dtype=settings.dtype)
        self.o_proj = fp8_linear(settings, heads * config.v_head_dim, config.hidden_size)
        self.sum_ranks = SumRanks(settings.parallelism.tp)

    def queries(self, qr: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the queries of all heads.

        Args:
            qr: [B, Q, q_lora_rank], the normed query latent.
            step: has the rotary tables.

        Returns:
            q_nope [B·Q, heads, qk_nope_head_dim] (see `product_per_head`), and q_pe [B, Q, heads, qk_rope_head_dim],
            rotated.
        """
        config = self.config
        q = self.q_b_proj(qr).view(-1, self.heads, config.qk_head_dim)
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_pe = rope_interleaved(q_pe.reshape(*qr.shape[:2], -1), step.cos, step.sin, self.heads)
        return q_nope, q_pe.unflatten(-1, (self.heads, -1))

    def latent_queries(self, q_nope: Tensor, lead: Sequence[int]) -> Tensor:
        """[B·Q, heads, qk_nope_head_dim] -> [B, Q, heads, kv_lora_rank], for lead = (B, Q)."""
        return product_per_head(q_nope, self.w_uk).unflatten(0, lead)

    def values(self, o_latent: Tensor) -> Tensor:
        """[B, Q, heads, kv_lora_rank] -> [B·Q, heads, v_head_dim]."""
        return product_per_head(o_latent.flatten(0, 1), self.w_uv.transpose(1, 2))

    def output(self, o: Tensor, lead: Sequence[int]) -> Tensor:
        """Values of all heads, of any shape with B·Q rows, -> [B, Q, hidden_size], for lead = (B, Q)."""
        return self.sum_ranks(self.o_proj(o.reshape(*lead, -1)))
