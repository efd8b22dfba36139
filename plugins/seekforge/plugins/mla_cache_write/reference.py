"""`MlaCacheWrite` in plain torch; returns a new cache, as torch operators here are functional."""

import torch
from torch import Tensor

from seekforge.common.errors import ShapeError
from seekforge.plugins.quant import fake_quantize, pack_latent


def mla_cache_write(
    latent_cache: Tensor, c: Tensor, k_pe: Tensor, slot_mapping: Tensor, kv_format: str, kv_fp8: bool
) -> Tensor:
    """Return a copy of the cache with this step's rows written.

    Args:
        latent_cache: [NB·64, C + R] f32 or bf16; for fp8_ds [NB, 64, record bytes] int8.
        c: [B, Q, C]. k_pe: [B, Q, R]. f32 or bf16.
        slot_mapping: [B, Q] int64; −1 goes to slot 0, which is scrap.

    Returns:
        The cache, same shape and dtype.

    Raises:
        ShapeError: fp8_ds without `kv_fp8`.
    """
    slots = slot_mapping.reshape(-1).clamp_min(0)
    c, k_pe = (t.reshape(-1, t.shape[-1]) for t in (c, k_pe))
    latent = latent_cache.clone()
    if kv_format == "fp8_ds":
        if not kv_fp8:
            raise ShapeError("MlaCacheWrite: kv_format fp8_ds needs kv_fp8; export with --numerics fp8 or use bf16")
        latent.view(-1, latent.shape[-1])[slots] = pack_latent(c, k_pe)
    else:
        c = fake_quantize(c) if kv_fp8 else c
        latent[slots] = torch.cat([c, k_pe], dim=-1).to(latent.dtype)
    return latent
