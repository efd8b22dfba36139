"""`MlaCacheWrite` in plain torch; returns a new cache, as torch operators here are functional."""

import torch
from torch import Tensor


def mla_cache_write(latent_cache: Tensor, c: Tensor, k_pe: Tensor, slot_mapping: Tensor, kv_format: str) -> Tensor:
    """Return a copy of the cache with this step's rows written.

    Args:
        latent_cache: [NB·64, C + R], f32 or bf16 as `kv_format` says.
        c: [B, Q, C]. k_pe: [B, Q, R]. f32 or bf16.
        slot_mapping: [B, Q] int64; −1 goes to slot 0, which is scrap.

    Returns:
        The cache, same shape and dtype.
    """
    latent = latent_cache.clone()
    latent[slot_mapping.reshape(-1).clamp_min(0)] = torch.cat([c, k_pe], dim=-1).flatten(0, 1).to(latent.dtype)
    return latent
