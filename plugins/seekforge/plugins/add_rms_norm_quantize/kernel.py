"""Residual, RMSNorm and FP8 quantizer of one row: read once, given to all that read the norm.

One program: one row, whole in registers as [BLOCKS, 128], so that the maximum of each block of 128 is a sum over an
axis. Bound by memory for many rows (two values read, two and a code written), by latency for few. All SMs.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import round_bf16, to_bf16, to_e4m3, ue8m0, wait_for_inputs


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, total_ptr, y_ptr, codes_ptr, scale_ptr, H, adds, epsilon,
    BLOCKS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """x, residual bf16 [T, H], weight f32 [H] -> total, y bf16 [T, H], codes u8 [T, H], scale f32 [T, H/128].

    Where `adds` is 0, there is no residual; else it is 1.
    """
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < H
    at = row * H + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + at, mask=column < H * adds, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    mean = tl.sum(tl.sum(x * x, 1), 0) / H
    y = round_bf16(x * (1.0 / tl.sqrt(mean + epsilon)) * weight)
    scale, inverse = ue8m0(tl.max(tl.abs(y), 1))
    tl.store(total_ptr + at, to_bf16(x), mask=inside)
    tl.store(y_ptr + at, to_bf16(y), mask=inside)
    tl.store(codes_ptr + at, to_e4m3(y * inverse[:, None], FP8), mask=inside)
    tl.store(scale_ptr + row * (H // 128) + block, scale, mask=block < H // 128)
