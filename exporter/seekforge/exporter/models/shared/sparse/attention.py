"""MLA with DSA: low-rank projections, the lightning indexer, sparse attention over the paged latent cache.

A layer without an indexer attends to the keys that the last layer before it with one chose (`Step.topk_indices`). It
caches no index key and has no part of the indexer's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seekforge.exporter.models.shared.latent_attention import LatentAttention
from seekforge.exporter.models.shared.layers import (
    LinearF32,
    fp8_linear,
    rope_interleaved,
    weight,
)
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.step import Step
from seekforge.plugins.dsa_attention.op import dsa_attention
from seekforge.plugins.dsa_cache_write.op import dsa_cache_write
from seekforge.plugins.dsa_indexer.op import dsa_indexer
from seekforge.plugins.dsa_indexer.reference import logical_slots
from seekforge.plugins.mla_cache_write.op import mla_cache_write

#: Turns the first dims of each head: `layers.rope_interleaved` or `layers.rope_half_split`.
Rope = Callable[[Tensor, Tensor, Tensor, int], Tensor]

#: LayerNorm epsilon of the indexer's keys; not rms_norm_eps, and not torch's default (spec §3.6, P4).
K_NORM_EPS = 1e-6


class Indexer(nn.Module):
    """Indexer queries, key and head weights of this step (spec §3.6).

    Args:
        settings: how it computes.
        rope: how index keys and queries are turned.
    """

    def __init__(self, settings: Settings, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        config = settings.config
        self.config = config
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = fp8_linear(settings, config.q_lora_rank, heads * dim)
        self.k_norm = KeyNorm(dim)
        self.weights_proj = LinearF32(config.hidden_size, heads, settings.dtype)

    def rotate(self, x: Tensor, step: Step, num_heads: int | None = None) -> Tensor:
        """Turn index keys or queries: RoPE on their first rope dims, then Hadamard where the numerics ask for it.

        Args:
            x: [B, Q, num_heads · D].
            step: has the tables.
            num_heads: number of heads of queries; None for keys, which have no axis of heads.

        Returns:
            [B, Q, num_heads, D], or [B, Q, D] for keys; dtype of `x`.
        """
        shape = (*x.shape[:2], num_heads, -1) if num_heads else x.shape
        x = self.rope(x, step.cos, step.sin, num_heads or 1)
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


class SparseAttention(LatentAttention):
    """One attention block; `qkv_a_proj` holds q_a_proj, indexer.wk and kv_a_proj_with_mqa, in this order.

    A layer that shares another's choice has no `indexer`, and no part of it in `qkv_a_proj`.
    """

    #: How the indexer turns keys and queries: a family's own.
    index_rope: ClassVar[Rope]

    def __init__(self, settings: Settings, layer: int) -> None:
        config = settings.config
        has_indexer = config.has_indexer(layer)
        super().__init__(settings, layer, (config.index_head_dim,) if has_indexer else ())
        self.indexer = Indexer(settings, type(self).index_rope) if has_indexer else None

    def forward(self, x: Tensor, step: Step, *caches: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Attend.

        Args:
            x: [B, Q, hidden_size], normed.
            step: where its tokens stand.
            caches: latent_cache [NB·64, latent_dim] and, with an indexer, index_cache [NB·64, index_head_dim].

        Returns:
            Output [B, Q, hidden_size], the caches with this step's rows, and (topk_indices [B, Q, index_topk],) if it
            chose keys.
        """
        kv_format, lead = self.settings.cache_dtype_name, x.shape[:2]
        q_raw, *index_raw, c_raw, k_pe = self.qkv_a_proj(x).split(self.splits, dim=-1)
        qr = self.q_a_layernorm(q_raw)
        q_nope, q_pe = self.queries(qr, step)
        latent = self.kv_a_layernorm(c_raw), rope_interleaved(k_pe, step.cos, step.sin)
        if self.indexer is None:
            assert step.topk_indices is not None
            written = (mla_cache_write(*caches, *latent, step.slot_mapping, kv_format, self.settings.numerics.kv_fp8),)
            chosen, topk_indices = (), step.topk_indices
        else:
            written, topk_indices = self._choose(self.indexer, x, qr, index_raw[0], latent, step, caches)
            chosen = (topk_indices,)
        if self.settings.form == "naive":
            o = self._naive(q_nope.unflatten(0, lead), q_pe, written[0], step, topk_indices)
        else:
            o_latent = dsa_attention(
                self.latent_queries(q_nope, lead),
                q_pe,
                written[0],
                step.block_table,
                topk_indices,
                self.config.softmax_scale,
                kv_format,
            )
            o = self.values(o_latent)
        return self.output(o, lead), written, chosen

    def _choose(
        self,
        indexer: Indexer,
        x: Tensor,
        qr: Tensor,
        index_raw: Tensor,
        latent: tuple[Tensor, Tensor],
        step: Step,
        caches: tuple[Tensor, ...],
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Cache this step's rows and choose keys: (both caches, topk_indices [B, Q, index_topk])."""
        numerics, kv_format = self.settings.numerics, self.settings.cache_dtype_name
        latent_cache, index_cache = dsa_cache_write(
            *caches,
            *latent,
            indexer.key(index_raw, step),
            step.slot_mapping,
            kv_format,
            kv_format,
            numerics.kv_fp8,
            numerics.indexer_fp8,
        )
        topk_indices = dsa_indexer(
            indexer.query(qr, step),
            indexer.head_weights(x),
            index_cache,
            step.block_table,
            step.positions,
            self.config.index_topk,
            numerics.indexer_fp8,
            kv_format,
        )
        return (latent_cache, index_cache), topk_indices

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
