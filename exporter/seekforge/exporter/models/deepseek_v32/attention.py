"""MLA with DSA: low-rank projections, the lightning indexer, sparse attention over the paged latent cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seekforge.exporter.models.deepseek_v32.layers import (
    LinearF32,
    RmsNorm,
    SumRanks,
    fp8_linear,
    product_per_head,
    rope_half_split,
    rope_interleaved,
    weight,
)
from seekforge.exporter.models.deepseek_v32.step import Settings, Step
from seekforge.plugins.dsa_attention.op import dsa_attention
from seekforge.plugins.dsa_cache_write.op import dsa_cache_write
from seekforge.plugins.dsa_indexer.op import dsa_indexer
from seekforge.plugins.dsa_indexer.reference import logical_slots

#: LayerNorm epsilon of the indexer's keys; not rms_norm_eps, and not torch's default (spec §3.6, P4).
K_NORM_EPS = 1e-6


class Indexer(nn.Module):
    """Indexer queries, key and head weights of this step (spec §3.6)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = settings.config
        self.config = config
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = fp8_linear(settings, "wq_b", config.q_lora_rank, heads * dim)
        self.k_norm = KeyNorm(dim)
        self.weights_proj = LinearF32(config.hidden_size, heads, settings.dtype)

    def rotate(self, x: Tensor, step: Step, num_heads: int | None = None) -> Tensor:
        """Turn index keys or queries: RoPE on their first rope dims, then Hadamard where the numerics ask for it.

        Args:
            x: [B, Q, num_heads · D].
            step: has the tables.
            num_heads: of queries; None for keys, which have no axis of heads.

        Returns:
            [B, Q, num_heads, D], or [B, Q, D] for keys; dtype of `x`.
        """
        shape = (*x.shape[:2], num_heads, -1) if num_heads else x.shape
        x = rope_half_split(x, step.cos, step.sin, num_heads or 1)
        if step.hadamard is not None:
            x = (x.reshape(-1, step.hadamard.shape[0]).float() @ step.hadamard).to(x.dtype)
        return x.reshape(shape)

    def key(self, raw: Tensor, step: Step) -> Tensor:
        """[B, Q, D] product of `wk` -> normed and rotated key, same shape."""
        return self.rotate(self.k_norm(raw), step)

    def query(self, qr: Tensor, step: Step) -> Tensor:
        """[B, Q, q_lora_rank] -> [B, Q, index_n_heads, D]."""
        return self.rotate(self.wq_b(qr), step, self.config.index_n_heads)

    def head_weights(self, x: Tensor) -> Tensor:
        """[B, Q, hidden_size] -> [B, Q, index_n_heads] f32, scales folded in."""
        return self.weights_proj(x) * self.config.index_scale


class KeyNorm(nn.Module):
    """LayerNorm with weight and bias in f32, rounded to the input's dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = weight(size, dtype=torch.float32)
        self.bias = weight(size, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same."""
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight, self.bias, K_NORM_EPS).to(x.dtype)


class Attention(nn.Module):
    """One attention block; `qkv_a_proj` holds q_a_proj, indexer.wk and kv_a_proj_with_mqa, in this order."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = settings.config
        self.settings, self.config = settings, config
        self.heads = heads = settings.rank.num_attention_heads
        self.splits = [config.q_lora_rank, config.index_head_dim, config.kv_lora_rank, config.qk_rope_head_dim]
        self.qkv_a_proj = fp8_linear(settings, "qkv_a_proj", config.hidden_size, sum(self.splits))
        self.q_a_layernorm = RmsNorm(config.q_lora_rank, config.rms_norm_eps, settings.dtype)
        self.q_b_proj = fp8_linear(settings, "q_b_proj", config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_layernorm = RmsNorm(config.kv_lora_rank, config.rms_norm_eps, settings.dtype)
        self.w_uk = weight(heads, config.qk_nope_head_dim, config.kv_lora_rank, dtype=settings.dtype)
        self.w_uv = weight(heads, config.v_head_dim, config.kv_lora_rank, dtype=settings.dtype)
        self.o_proj = fp8_linear(settings, "o_proj", heads * config.v_head_dim, config.hidden_size)
        self.indexer = Indexer(settings)
        self.sum_ranks = SumRanks(settings.parallelism.tp)

    def forward(
        self, x: Tensor, step: Step, latent_cache: Tensor, index_cache: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Attend.

        Args:
            x: [B, Q, hidden_size], normed.
            latent_cache: [NB·64, latent_dim]. index_cache: [NB·64, index_head_dim].

        Returns:
            Output [B, Q, hidden_size], both caches with this step's rows, (topk_indices [B, Q, index_topk],).
        """
        config, numerics = self.config, self.settings.numerics
        kv_format = self.settings.dtype_name
        q_raw, index_raw, c_raw, k_pe = self.qkv_a_proj(x).split(self.splits, dim=-1)
        qr = self.q_a_layernorm(q_raw)
        lead = x.shape[:2]
        q = self.q_b_proj(qr).view(-1, self.heads, config.qk_head_dim)  # [B·Q, h, ...]: see product_per_head
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_pe = rope_interleaved(q_pe.reshape(*lead, -1), step.cos, step.sin, self.heads)
        q_pe = q_pe.unflatten(-1, (self.heads, -1))
        latent_cache, index_cache = dsa_cache_write(
            latent_cache,
            index_cache,
            self.kv_a_layernorm(c_raw),
            rope_interleaved(k_pe, step.cos, step.sin),
            self.indexer.key(index_raw, step),
            step.slot_mapping,
            kv_format,
            kv_format,
            numerics.kv_fp8,
            numerics.indexer_fp8,
        )
        topk_indices = dsa_indexer(
            self.indexer.query(qr, step),
            self.indexer.head_weights(x),
            index_cache,
            step.block_table,
            step.positions,
            config.index_topk,
            numerics.indexer_fp8,
            kv_format,
        )
        if self.settings.form == "naive":
            o = self._naive(q_nope.unflatten(0, lead), q_pe, latent_cache, step, topk_indices)
        else:
            q_latent = product_per_head(q_nope, self.w_uk).unflatten(0, lead)
            o_latent = dsa_attention(
                q_latent, q_pe, latent_cache, step.block_table, topk_indices, config.softmax_scale, kv_format
            )
            o = product_per_head(o_latent.flatten(0, 1), self.w_uv.transpose(1, 2))
        return self.sum_ranks(self.o_proj(o.reshape(*lead, -1))), (latent_cache, index_cache), (topk_indices,)

    def _naive(self, q_nope: Tensor, q_pe: Tensor, latent_cache: Tensor, step: Step, topk: Tensor) -> Tensor:
        """Multi-head form with expanded keys and values and a mask (spec §3.4): [B, Q, h, v_head_dim]."""
        config = self.config
        cached = latent_cache[logical_slots(step.block_table)]  # [B, L, latent_dim]
        c, k_pe = cached.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        k_nope = c.unsqueeze(1) @ self.w_uk.transpose(1, 2)  # [B, h, L, nope]
        v = c.unsqueeze(1) @ self.w_uv.transpose(1, 2)
        k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(*k_nope.shape[:3], -1)], dim=-1)
        q = torch.cat([q_nope, q_pe], dim=-1).transpose(1, 2)
        scores = (q.float() @ k.float().transpose(-1, -2)) * config.softmax_scale
        length = cached.shape[1]
        chosen = torch.zeros(*topk.shape[:2], length + 1, dtype=torch.bool)
        chosen.scatter_(-1, torch.where(topk < 0, length, topk).long(), True)
        chosen = chosen[..., :length].unsqueeze(1)
        p = torch.softmax(scores.masked_fill(~chosen, -torch.inf), dim=-1)
        p = p.masked_fill(~chosen.any(-1, keepdim=True), 0.0)
        return (p @ v.float()).to(q.dtype).transpose(1, 2)
