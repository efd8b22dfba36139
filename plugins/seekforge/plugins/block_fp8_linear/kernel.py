"""FP8 block linear: y = x · Wᵀ with one f32 promotion per 128 along K (spec §5.2).

Few tokens (`narrow_kernel`): the weight bounds the time, so each program streams 16 or 32 of its rows whole, a part of
K in each warp, which gives every SM work with one launch and no sum afterwards. Up to four rows it quantizes itself;
more are quantized first (`quantize_kernel`, shared), so once however many programs read them. Many tokens
(`linear_kernel`): square tiles, rows in groups of 8 for L2. Where tcgen05 is, what lies between has the weight's rows
as the M side of the product (`SWAP`), which must be 64 or more there, and K cut into splits; another launch adds these
in order and rounds.
Each 128 block starts from a zero accumulator: that is the promotion; the tensor core's own sum is less exact.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import dot_bf16, quantize_kernel, to_bf16, to_e4m3, ue8m0, widen

__all__ = ["combine_splits_kernel", "linear_kernel", "narrow_kernel", "quantize_kernel"]


@triton.jit
def narrow_kernel(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, y_ptr, num_rows, N, K,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    QUANT: tl.constexpr, QUANTIZE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Few out features of y bf16 [T, N] for all rows, T <= BLOCK_T; a warp has every `PARTS`-th block of 128 along K.

    a [T, K] e4m3 with scales [T, K/128], or bf16: to be quantized here (QUANTIZE) or not at all (not QUANT).
    """
    tile_n = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 128)
    t_ok, n_ok = t < num_rows, n < N
    # rows past the end read row 0 and are not stored: no mask in the loop, so loads stay vectors
    row = tl.where(t_ok, t, 0)
    a_at = a_ptr + row[None, :, None] * K + k[None, None, :]
    w_at = w_ptr + tl.where(n_ok, n, 0).to(tl.int64)[None, :, None] * K + k[None, None, :]
    blocks = K // 128
    a_scale_at = a_scale_ptr + row[None, :] * blocks
    w_scale_at = w_scale_ptr + (tile_n * BLOCK_N // 128).to(tl.int64) * blocks

    acc = tl.zeros([PARTS, BLOCK_N, BLOCK_T], tl.float32)
    for first in range(0, blocks, PARTS):
        block = first + tl.arange(0, PARTS)
        in_k = block < blocks
        block = tl.where(in_k, block, 0)
        a = tl.load(a_at + block[:, None, None] * 128)
        w = tl.load(w_at + block[:, None, None] * 128)
        scale = tl.where(in_k, tl.load(w_scale_at + block), 0.0)[:, None]
        if QUANTIZE:
            x = a.to(tl.float32)
            row_scale, inverse = ue8m0(tl.max(tl.abs(x), 2))
            scale = row_scale * scale
            a = to_e4m3(x * inverse[:, :, None], FP8)
            if FP8:
                a = a.to(tl.float8e4nv, bitcast=True)
        elif QUANT:
            scale = tl.load(a_scale_at + block[:, None]) * scale
        acc += _product(w, tl.permute(a, (0, 2, 1)), QUANT, FP8) * scale[:, None, :]
    y = tl.trans(tl.sum(acc, 0))
    tl.store(y_ptr + t[:, None] * N + n[None, :], to_bf16(y), mask=t_ok[:, None] & n_ok[None, :])


@triton.jit
def linear_kernel(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, y_ptr, num_rows, N, K, splits,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, QUANT: tl.constexpr, FP8: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of one split of it.

    a [T, K] e4m3 with scales [T, K/128], or bf16 (not QUANT); w [N, K]; y bf16 [T, N] or f32 [splits, T, N] (PARTIAL).
    BLOCK_N divides 128: a tile has one weight scale per block.
    """
    split = tl.program_id(1)
    tiles_t = tl.cdiv(num_rows, BLOCK_T)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (GROUP * tiles_n)
    first = band * GROUP
    width = tl.minimum(tiles_t - first, GROUP)
    tile_t = first + (pid % (GROUP * tiles_n)) % width
    tile_n = (pid % (GROUP * tiles_n)) // width

    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, 128)
    t_ok, n_ok = t < num_rows, n < N
    # rows past the end read row 0 and are not stored: no mask in the loop, so loads stay vectors
    a_at = a_ptr + tl.where(t_ok, t, 0).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w_ptr + tl.where(n_ok, n, 0).to(tl.int64)[:, None] * K + k[None, :]
    blocks = K // 128
    a_scale_at = a_scale_ptr + tl.where(t_ok, t, 0).to(tl.int64) * blocks
    w_scale_at = w_scale_ptr + (tile_n * BLOCK_N // 128).to(tl.int64) * blocks

    per_split = tl.cdiv(blocks, splits)
    start = split * per_split
    end = tl.minimum(start + per_split, blocks)
    if SWAP:
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for block in range(start, end):
        a = tl.load(a_at + block * 128)
        w = tl.load(w_at + block * 128)
        scale = tl.load(w_scale_at + block)
        if SWAP:
            part = _product(w, tl.trans(a), QUANT, FP8)
        else:
            part = _product(a, tl.trans(w), QUANT, FP8)
        if QUANT:
            row_scale = tl.load(a_scale_at + block) * scale
            if SWAP:
                acc += part * row_scale[None, :]
            else:
                acc += part * row_scale[:, None]
        else:
            acc += part * scale
    if SWAP:
        acc = tl.trans(acc)
    at = t.to(tl.int64)[:, None] * N + n[None, :]
    mask = t_ok[:, None] & n_ok[None, :]
    if PARTIAL:
        tl.store(y_ptr + split.to(tl.int64) * num_rows * N + at, acc, mask=mask)
    else:
        tl.store(y_ptr + at, to_bf16(acc), mask=mask)


@triton.jit
def _product(a, b, QUANT: tl.constexpr, FP8: tl.constexpr):
    if QUANT and FP8:
        return tl.dot(a, b)
    return dot_bf16(widen(a, FP8), widen(b, FP8))


@triton.jit
def combine_splits_kernel(part_ptr, y_ptr, num_elements, splits, BLOCK: tl.constexpr):
    """f32 [splits, T·N] -> bf16 [T·N]: splits added in order, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + split * num_elements + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, to_bf16(total), mask=mask)
