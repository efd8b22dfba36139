"""`DsaCacheWrite` in plain torch; returns new caches, as torch operators here are functional."""

import torch
from torch import Tensor

from seekforge.common.errors import ShapeError
from seekforge.plugins.quant import BLOCK, fake_quantize, index_key_offsets, pack_latent, quantize


def dsa_cache_write(
    latent_cache: Tensor,
    index_cache: Tensor,
    c: Tensor,
    k_pe: Tensor,
    index_k: Tensor,
    slot_mapping: Tensor,
    kv_format: str,
    index_format: str,
    kv_fp8: bool,
    indexer_fp8: bool,
) -> tuple[Tensor, Tensor]:
    """Return copies of both caches with this step's rows written.

    Args:
        latent_cache: [NB·64, C + R] f32 or bf16; for fp8_ds [NB, 64, record bytes] int8.
        index_cache: [NB·64, D] f32 or bf16; for fp8_ds [NB, 64·132] int8.
        c: [B, Q, C]. k_pe: [B, Q, R]. index_k: [B, Q, D]. f32 or bf16.
        slot_mapping: [B, Q] int64; −1 goes to slot 0, which is scrap.

    Returns:
        The two caches, same shapes and dtypes.

    Raises:
        ShapeError: fp8_ds without the matching quantization switch.
    """
    slots = slot_mapping.reshape(-1).clamp_min(0)
    c, k_pe, index_k = (t.reshape(-1, t.shape[-1]) for t in (c, k_pe, index_k))
    latent, index = latent_cache.clone(), index_cache.clone()
    if kv_format == "fp8_ds":
        if not kv_fp8:
            raise ShapeError("DsaCacheWrite: kv_format fp8_ds needs kv_fp8; export with --numerics fp8 or use bf16")
        latent.view(-1, latent.shape[-1])[slots] = pack_latent(c, k_pe)
    else:
        c = fake_quantize(c) if kv_fp8 else c
        latent[slots] = torch.cat([c, k_pe], dim=-1).to(latent.dtype)
    if index_format == "fp8_ds":
        if not indexer_fp8:
            raise ShapeError("DsaCacheWrite: index_format fp8_ds needs indexer_fp8; use bf16 instead")
        q, scale = quantize(index_k)
        values, scales = index_key_offsets(slots)
        flat = index.view(-1)
        flat[values.unsqueeze(-1) + torch.arange(BLOCK)] = q.view(torch.int8)
        flat[scales.unsqueeze(-1) + torch.arange(4)] = scale.view(torch.int8)
    else:
        index[slots] = (fake_quantize(index_k) if indexer_fp8 else index_k).to(index.dtype)
    return latent, index
