"""`MlaAttention` in plain torch: all cached rows of a sequence, softmax in f32, one block of queries at a time.

Queries in f64 are computed in f64: what tests of f32 operators hold peaked scores to, whose rounding depends on the
machine's products.
"""

import torch
from torch import Tensor

from seekforge.formats.paged_cache import BLOCK_SIZE

_ROWS = 64  # queries per pass: bounds the scores [B, _ROWS, H, L]


def mla_attention(
    q_latent: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
    scale: float,
    kv_format: str,
) -> Tensor:
    """Return the attention output in the latent space.

    Args:
        q_latent: [B, Q, H, C]. q_pe: [B, Q, H, R]. f32, bf16 or f64.
        latent_cache: [NB·64, C + R], f32 or bf16 as `kv_format` says.
        block_table: [B, MB] int32.
        positions: [B, Q] int64; a row of −1 sees no key.

    Returns:
        [B, Q, H, C], dtype of `q_latent`; 0 for a padded row.
    """
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    slots = (block_table.long().unsqueeze(-1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten(1)
    at = torch.arange(slots.shape[1])
    used = at <= positions.amax(1, keepdim=True)
    # rubbish (NaN) behind the last position must not leak through 0 · NaN
    cached = latent_cache[slots].to(wide).masked_fill(~used.unsqueeze(-1), 0.0)
    c = cached[..., : q_latent.shape[-1]]
    query = torch.cat([q_latent, q_pe], dim=-1)
    out = torch.empty_like(q_latent)
    for start in range(0, q_latent.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        last = max(1, int(positions[:, rows].max()) + 1)  # no query of these sees a key behind it
        visible = (at[:last] <= positions[:, rows].unsqueeze(-1)).unsqueeze(2)
        s = torch.einsum("bqhw,blw->bqhl", query[:, rows].to(wide), cached[:, :last]) * scale
        p = torch.softmax(s.masked_fill(~visible, -torch.inf), dim=-1).masked_fill(~visible, 0.0)
        out[:, rows] = torch.einsum("bqhl,blc->bqhc", p, c[:, :last]).to(out.dtype)
    return out
