"""`DsaAttention` in plain torch: gather the chosen rows, softmax in f32, one block of queries at a time.

Queries in f64 are computed in f64, as those of `MlaAttention` are.
"""

import torch
from torch import Tensor

from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.quant import unpack_latent

_ROWS = 64  # queries per pass: bounds the gathered [B, _ROWS, TOPK, C + R]


def dsa_attention(
    q_latent: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    block_table: Tensor,
    topk_indices: Tensor,
    scale: float,
    kv_format: str,
) -> Tensor:
    """Return the attention output in the latent space.

    Args:
        q_latent: [B, Q, H, C]. q_pe: [B, Q, H, R]. f32, bf16 or f64.
        latent_cache: [NB·64, C + R] f32 or bf16, or [NB, 64, record bytes] int8 for fp8_ds.
        block_table: [B, MB] int32.
        topk_indices: [B, Q, TOPK] int32; −1 is no key, wherever it stands.

    Returns:
        [B, Q, H, C], dtype of `q_latent`; 0 for a query without any key.

    Source: spec §3.5; FP32 softmax as in FlashMLA @9241ae3 (spec §3.4).
    """
    latent_dim = q_latent.shape[-1]
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    out = torch.empty_like(q_latent)
    for start in range(0, q_latent.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        chosen = topk_indices[:, rows].long()
        used = (chosen >= 0).flatten(0, 1).any(0).nonzero()
        chosen = chosen[..., : int(used.max()) + 1 if len(used) else 1]  # the first rows of a prompt see few keys
        valid = chosen >= 0
        safe = chosen.clamp_min(0)
        block = torch.gather(block_table.long(), 1, (safe // BLOCK_SIZE).flatten(1)).view_as(safe)
        slots = block * BLOCK_SIZE + safe % BLOCK_SIZE
        if kv_format == "fp8_ds":
            c, k_pe = unpack_latent(latent_cache.view(-1, latent_cache.shape[-1])[slots], latent_dim)
        else:
            c, k_pe = latent_cache[slots].split([latent_dim, q_pe.shape[-1]], dim=-1)
        # rubbish (NaN) in rows that are not chosen must not leak through 0 · NaN
        c, k_pe = (part.to(wide).masked_fill_(~valid.unsqueeze(-1), 0.0) for part in (c, k_pe))
        s = q_latent[:, rows].to(wide) @ c.transpose(-1, -2) + q_pe[:, rows].to(wide) @ k_pe.transpose(-1, -2)
        s = (s * scale).masked_fill(~valid.unsqueeze(2), -torch.inf)
        p = torch.softmax(s, dim=-1).masked_fill(~valid.any(-1)[..., None, None], 0.0)
        out[:, rows] = (p @ c).to(out.dtype)
    return out
