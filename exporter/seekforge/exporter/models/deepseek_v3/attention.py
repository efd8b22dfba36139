"""Multi-head latent attention over the whole context: low-rank projections, the paged latent cache."""

from __future__ import annotations

from torch import Tensor, nn

from seekforge.exporter.models.deepseek_v32.layers import (
    RmsNorm,
    SumRanks,
    fp8_linear,
    product_per_head,
    rope_interleaved,
    weight,
)
from seekforge.exporter.models.deepseek_v32.step import Settings, Step
from seekforge.plugins.mla_attention.op import mla_attention
from seekforge.plugins.mla_cache_write.op import mla_cache_write


class Attention(nn.Module):
    """One attention block, absorbed; `qkv_a_proj` holds q_a_proj and kv_a_proj_with_mqa, in this order."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = settings.config
        self.settings, self.config = settings, config
        self.heads = heads = settings.rank.num_attention_heads
        self.splits = [config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim]
        self.qkv_a_proj = fp8_linear(settings, "qkv_a_proj", config.hidden_size, sum(self.splits))
        self.q_a_layernorm = RmsNorm(config.q_lora_rank, config.rms_norm_eps, settings.dtype)
        self.q_b_proj = fp8_linear(settings, "q_b_proj", config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_layernorm = RmsNorm(config.kv_lora_rank, config.rms_norm_eps, settings.dtype)
        self.w_uk = weight(heads, config.qk_nope_head_dim, config.kv_lora_rank, dtype=settings.dtype)
        self.w_uv = weight(heads, config.v_head_dim, config.kv_lora_rank, dtype=settings.dtype)
        self.o_proj = fp8_linear(settings, "o_proj", heads * config.v_head_dim, config.hidden_size)
        self.sum_ranks = SumRanks(settings.parallelism.tp)

    def forward(
        self, x: Tensor, step: Step, latent_cache: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Attend.

        Args:
            x: [B, Q, hidden_size], normed.
            latent_cache: [NB·64, latent_dim].

        Returns:
            Output [B, Q, hidden_size], (the cache with this step's rows,), (): nothing is chosen.
        """
        config, kv_format = self.config, self.settings.dtype_name
        q_raw, c_raw, k_pe = self.qkv_a_proj(x).split(self.splits, dim=-1)
        lead = x.shape[:2]
        q = self.q_b_proj(self.q_a_layernorm(q_raw)).view(-1, self.heads, config.qk_head_dim)
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_pe = rope_interleaved(q_pe.reshape(*lead, -1), step.cos, step.sin, self.heads)
        latent_cache = mla_cache_write(
            latent_cache,
            self.kv_a_layernorm(c_raw),
            rope_interleaved(k_pe, step.cos, step.sin),
            step.slot_mapping,
            kv_format,
        )
        o_latent = mla_attention(
            product_per_head(q_nope, self.w_uk).unflatten(0, lead),
            q_pe.unflatten(-1, (self.heads, -1)),
            latent_cache,
            step.block_table,
            step.positions,
            config.softmax_scale,
            kv_format,
        )
        o = product_per_head(o_latent.flatten(0, 1), self.w_uv.transpose(1, 2))
        return self.sum_ranks(self.o_proj(o.reshape(*lead, -1))), (latent_cache,), ()
