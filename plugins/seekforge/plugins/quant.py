"""FP8 block quantization, the Hadamard rotation and the cache byte layouts, in plain torch (spec §5, §7).

These are the roundings of the official reference; every body and kernel is judged against them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from seekforge.formats.paged_cache import BLOCK_SIZE, index_row_bytes, latent_row_bytes

#: Largest finite e4m3 value, its reciprocal in f32 (0x3B124925), the floor of a block's amax, and the block.
E4M3_MAX = 448.0
E4M3_MAX_INVERSE = 0.002232142857142857
AMAX_FLOOR = 1e-4
BLOCK = 128

#: Bytes of one latent record per 512 latent values, bytes of one indexer key (spec §7).
INDEX_KEY_BYTES = index_row_bytes(128, "fp8_ds")


def ue8m0_scale(amax: Tensor) -> Tensor:
    """Return the power-of-two scale of blocks whose largest magnitude is `amax`.

    Args:
        amax: any shape, f32, not negative.

    Returns:
        Same shape, f32: 2^ceil(log2(max(amax, 1e-4) / 448)), found on the bit pattern.

    Source: spec §5.1; HF inference/kernel.py, `act_quant_kernel` with scale_fmt ue8m0.
    """
    p = amax.clamp_min(AMAX_FLOOR) * torch.tensor(E4M3_MAX_INVERSE, dtype=torch.float32)
    bits = p.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent << 23).view(torch.float32)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize blocks of 128 along the last axis.

    Args:
        x: [..., K], f32 or bf16, K a multiple of 128.

    Returns:
        q [..., K] float8_e4m3fn, scale [..., K / 128] f32; x ≈ q · scale.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = ue8m0_scale(blocks.abs().amax(-1))
    q = (blocks / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return q.flatten(-2), scale


def fake_quantize(x: Tensor) -> Tensor:
    """Quantize and dequantize blocks of 128 along the last axis; keeps shape and dtype.

    e4m3 times a power of two is exact in bf16, so nothing but the FP8 rounding is lost.
    """
    q, scale = quantize(x)
    return (q.float().unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2).to(x.dtype)


def dequantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Return `weight` times its 128×128 block scales.

    Args:
        weight: [N, K] float8_e4m3fn, or int8 with the same bytes; kept values in f32 or bf16, whose scales are 1.
        scale: [⌈N/128⌉, ⌈K/128⌉] f32. The last block row and column may be part full.

    Returns:
        [N, K] f32.
    """
    if weight.dtype in (torch.float32, torch.bfloat16):
        return weight.float()
    if weight.dtype == torch.int8:
        weight = weight.view(torch.float8_e4m3fn)
    wide = scale.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]
    values = weight.float()  # a copy of its own, so that one pass over it is enough
    for rows, factors in zip(values.split(BLOCK), wide, strict=True):
        rows *= factors
    return values


@functools.cache
def hadamard_matrix(size: int = BLOCK) -> Tensor:
    """Return the Sylvester Hadamard matrix times size^-0.5, f32 [size, size] (spec §3.6).

    H[i, j] = (−1)^popcount(i AND j); orthonormal and symmetric.
    """
    index = torch.arange(size)
    ones = torch.zeros(size, size, dtype=torch.int64)
    both = index.unsqueeze(1) & index.unsqueeze(0)
    while bool(both.any()):
        ones += both & 1
        both = both >> 1
    return (1.0 - 2.0 * (ones % 2)).to(torch.float32) * size**-0.5


# --- cache byte layouts (spec §7) ---------------------------------------------------------------------------


def latent_record_bytes(kv_lora_rank: int, rope_dim: int) -> int:
    """Bytes of one fp8_ds latent record: e4m3 latent, f32 scale per 128, bf16 rotary key (656 for V3.2)."""
    return latent_row_bytes(kv_lora_rank, rope_dim, "fp8_ds")


def pack_latent(c: Tensor, k_pe: Tensor) -> Tensor:
    """Pack latents and rotary keys into fp8_ds records.

    Args:
        c: [T, kv_lora_rank], f32 or bf16.
        k_pe: [T, rope_dim], f32 or bf16; stored as bf16.

    Returns:
        [T, latent_record_bytes] int8.

    Source: FlashMLA @9241ae3, "FP8 with scale" layout; scale rule of HF (spec §7.1).
    """
    q, scale = quantize(c)
    parts = (q.contiguous(), scale.contiguous(), k_pe.to(torch.bfloat16).contiguous())
    return torch.cat([part.view(torch.int8) for part in parts], dim=-1)


def unpack_latent(records: Tensor, kv_lora_rank: int) -> tuple[Tensor, Tensor]:
    """Undo `pack_latent`: returns c [T, kv_lora_rank] and k_pe [T, rope_dim], both f32."""
    scales_end = kv_lora_rank + kv_lora_rank // BLOCK * 4
    q = records[..., :kv_lora_rank].contiguous().view(torch.float8_e4m3fn).float()
    scale = records[..., kv_lora_rank:scales_end].contiguous().view(torch.float32)
    k_pe = records[..., scales_end:].contiguous().view(torch.bfloat16).float()
    return (q.unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2), k_pe


def index_key_offsets(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Where slot `slots` [T] lives in the split indexer page: byte offsets of its values and of its scale."""
    page, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    base = page * BLOCK_SIZE * INDEX_KEY_BYTES
    return base + offset * BLOCK, base + BLOCK_SIZE * BLOCK + offset * 4


def unpack_index_keys(pages: Tensor, slots: Tensor) -> Tensor:
    """Read indexer keys from fp8_ds pages.

    Args:
        pages: [NB, 64 * 132] int8: 64 rows of 128 values, then 64 f32 scales (spec §7.2).
        slots: [...] int64.

    Returns:
        [..., 128] f32, dequantized.
    """
    flat = pages.reshape(-1)
    values, scales = index_key_offsets(slots)
    q = flat[values.unsqueeze(-1) + torch.arange(BLOCK)].view(torch.float8_e4m3fn).float()
    scale = flat[scales.unsqueeze(-1) + torch.arange(4)].view(torch.float32)
    return q * scale
