"""Cache write of layers without indexer keys: one launch quantizes latents and scatters them into the paged cache.

Layouts (spec §7): `fp8_ds` record = C e4m3, C/128 f32 scales, R bf16; `bf16`: rows of C + R. All SMs. Bound by launch
latency below some 256 tokens, by memory above; four tokens per program, as `DsaCacheWrite` has them.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import round_to_e4m3, to_bf16, to_e4m3, ue8m0, wait_for_inputs


@triton.jit
def latent_write_kernel(
    latent_ptr, c_ptr, k_pe_ptr, slot_ptr, num_tokens, num_slots,
    C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KV_BYTES: tl.constexpr, KV_FP8: tl.constexpr,
    FP8: tl.constexpr,
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
    column = tile[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    c = tl.load(c_ptr + row[:, None, None] * C + column, mask=valid[:, None, None], other=0.0).to(tl.float32)
    rope = tl.arange(0, R)
    k_pe = tl.load(k_pe_ptr + row[:, None] * R + rope[None, :], mask=valid[:, None], other=0.0)
    scale, inverse = ue8m0(tl.max(tl.abs(c), 2))
    if KV_BYTES:
        record = slot * (C + 4 * TILES + 2 * R)
        q = to_e4m3(c * inverse[:, :, None], FP8)
        tl.store(latent_ptr + record[:, None, None] + column, q, mask=valid[:, None, None])
        scales = (latent_ptr + record + C).to(tl.pointer_type(tl.float32))
        tl.store(scales[:, None] + tile[None, :], scale, mask=valid[:, None])
        ropes = (latent_ptr + record + C + 4 * TILES).to(tl.pointer_type(tl.bfloat16))
        tl.store(ropes[:, None] + rope[None, :], k_pe, mask=valid[:, None])
    else:
        if KV_FP8:
            # rounding to e4m3 by integer operations: the same on every SM
            scaled = tl.minimum(tl.maximum(c * inverse[:, :, None], -448.0), 448.0)
            c = round_to_e4m3(scaled) * scale[:, :, None]
        start = slot * (C + R)
        tl.store(latent_ptr + start[:, None, None] + column, to_bf16(c), mask=valid[:, None, None])
        tl.store(latent_ptr + start[:, None] + C + rope[None, :], k_pe, mask=valid[:, None])
