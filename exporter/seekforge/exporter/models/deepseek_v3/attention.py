"""Latent attention over the whole context: every token attends to all before it."""

from __future__ import annotations

from torch import Tensor

from seekforge.exporter.models.shared.latent_attention import LatentAttention
from seekforge.exporter.models.shared.layers import rope_interleaved
from seekforge.exporter.models.shared.step import Step
from seekforge.plugins.mla_attention.op import mla_attention
from seekforge.plugins.mla_cache_write.op import mla_cache_write


class Attention(LatentAttention):
    """One attention block; `qkv_a_proj` holds q_a_proj and kv_a_proj_with_mqa, in this order."""

    def forward(
        self, x: Tensor, step: Step, latent_cache: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Attend.

        Args:
            x: [B, Q, hidden_size], normed.
            step: where its tokens stand.
            latent_cache: [NB·64, latent_dim].

        Returns:
            Output [B, Q, hidden_size], (the cache with this step's rows,), (): nothing is chosen.
        """
        kv_format, lead = self.settings.cache_dtype_name, x.shape[:2]
        q_raw, c_raw, k_pe = self.qkv_a_proj(x).split(self.splits, dim=-1)
        q_nope, q_pe = self.queries(self.q_a_layernorm(q_raw), step)
        latent_cache = mla_cache_write(
            latent_cache,
            self.kv_a_layernorm(c_raw),
            rope_interleaved(k_pe, step.cos, step.sin),
            step.slot_mapping,
            kv_format,
            False,  # the model is not quantized for its cache
        )
        o_latent = mla_attention(
            self.latent_queries(q_nope, lead),
            q_pe,
            latent_cache,
            step.block_table,
            step.positions,
            self.config.softmax_scale,
            kv_format,
        )
        return self.output(self.values(o_latent), lead), (latent_cache,), ()
