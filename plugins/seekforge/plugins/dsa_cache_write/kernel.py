"""Cache write: one launch quantizes latents and indexer keys and scatters them into the paged caches.

Layouts (spec §7): `fp8_ds` latent record = C e4m3, C/128 f32 scales, R bf16; indexer page = 64 x 128 e4m3, then 64 f32
scales. `bf16`: rows of C + R, and of 128. All SMs. Bound by launch latency below some 256 tokens, by memory
above; four tokens per program keep every access a 16-byte vector and give 32 programs at 128 tokens.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import round_to_e4m3, to_bf16, to_e4m3, ue8m0, wait_for_inputs


@triton.jit
def cache_write_kernel(
    latent_ptr, index_ptr, c_ptr, k_pe_ptr, index_k_ptr, slot_ptr, num_tokens, num_slots,
    C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KV_BYTES: tl.constexpr, INDEX_BYTES: tl.constexpr,
    KV_FP8: tl.constexpr, INDEX_FP8: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Write ROWS tokens. A slot outside the pool, -1 first of all, is skipped. Offsets are 64-bit throughout."""
    wait_for_inputs()
    TILES: tl.constexpr = C // 128
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_ptr + row, mask=row < num_tokens, other=-1)
    valid = (slot >= 0) & (slot < num_slots)
    slot = tl.where(valid, slot, 0)
    row = row.to(tl.int64)

    tile = tl.arange(0, TILES)
    lane = tl.arange(0, 128)
    column = tile[None, :, None] * 128 + lane[None, None, :]
    c = tl.load(c_ptr + row[:, None, None] * C + column, mask=valid[:, None, None], other=0.0).to(tl.float32)
    rope = tl.arange(0, R)
    k_pe = tl.load(k_pe_ptr + row[:, None] * R + rope[None, :], mask=valid[:, None], other=0.0)
    scale, inverse = ue8m0(tl.max(tl.abs(c), 2))
    if KV_BYTES:
        RECORD: tl.constexpr = C + 4 * TILES + 2 * R
        record = slot * RECORD
        q = to_e4m3(c * inverse[:, :, None], FP8)
        tl.store(latent_ptr + record[:, None, None] + column, q, mask=valid[:, None, None])
        scales = (latent_ptr + record + C).to(tl.pointer_type(tl.float32))
        tl.store(scales[:, None] + tile[None, :], scale, mask=valid[:, None])
        ropes = (latent_ptr + record + C + 4 * TILES).to(tl.pointer_type(tl.bfloat16))
        tl.store(ropes[:, None] + rope[None, :], k_pe, mask=valid[:, None])
    else:
        if KV_FP8:
            c = _through_fp8(c, scale[:, :, None], inverse[:, :, None])
        start = slot * (C + R)
        tl.store(latent_ptr + start[:, None, None] + column, to_bf16(c), mask=valid[:, None, None])
        tl.store(latent_ptr + start[:, None] + C + rope[None, :], k_pe, mask=valid[:, None])

    key = tl.load(index_k_ptr + row[:, None] * 128 + lane[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
    scale, inverse = ue8m0(tl.max(tl.abs(key), 1))
    if INDEX_BYTES:
        page = (slot // 64) * (64 * 132)
        q = to_e4m3(key * inverse[:, None], FP8)
        tl.store(index_ptr + (page + slot % 64 * 128)[:, None] + lane[None, :], q, mask=valid[:, None])
        scales = (index_ptr + page + 64 * 128).to(tl.pointer_type(tl.float32))
        tl.store(scales + slot % 64, scale, mask=valid)
    else:
        if INDEX_FP8:
            key = _through_fp8(key, scale[:, None], inverse[:, None])
        tl.store(index_ptr + slot[:, None] * 128 + lane[None, :], to_bf16(key), mask=valid[:, None])


@triton.jit
def _through_fp8(x, scale, inverse):
    """Quantize and dequantize: rounding to e4m3 by integer operations, the same in both modes and on every SM."""
    return round_to_e4m3(tl.minimum(tl.maximum(x * inverse, -448.0), 448.0)) * scale
