"""FP8 block linear: y = x · Wᵀ with one f32 promotion per 128 along K (spec §5.2).

Few tokens (`narrow_kernel`): the weight bounds the time, so each program streams 16 or 32 of its rows whole, a part of
K in each warp, which gives every SM work with one launch and no sum afterwards. Rows that are not quantized yet it
quantizes itself, up to four; more are quantized first (`quantize_kernel`, shared), so once however many programs read
them. Many tokens (`tile_kernel`): square tiles, rows in groups of 8 for L2. Where tiles are fewer than SMs have room
for, K is cut into splits, so that every SM streams a part of the weight; another launch adds these in order and rounds.
Each 128 block starts from a zero accumulator: that is the promotion; the tensor core's own sum is less exact. A program
waits for a product before it promotes it; another on the same SM multiplies meanwhile.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import (
    dot_f32,
    k_blocks,
    quantize_kernel,
    to_bf16,
    to_e4m3,
    ue8m0,
    wait_for_inputs,
    widen,
)

__all__ = ["combine_splits_kernel", "narrow_kernel", "quantize_kernel", "tile_kernel"]


@triton.jit
def narrow_kernel(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, y_ptr, num_rows, N, K,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    QUANT: tl.constexpr, QUANTIZE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Few out features of y bf16 [T, N] for all rows, T <= BLOCK_T; a warp has every `PARTS`-th block of 128 along K.

    a [T, K] e4m3 with scales [T, K/128], or bf16: to be quantized here (QUANTIZE) or not at all (not QUANT).
    """
    wait_for_inputs()
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
    block, _ = k_blocks(0, blocks, PARTS)
    w_scale = tl.load(w_scale_at + block)
    if QUANT and not QUANTIZE:
        a_scale = tl.load(a_scale_at + block[:, None])
    for first in range(0, blocks, PARTS):
        block, in_k = k_blocks(first, blocks, PARTS)
        ahead, _ = k_blocks(first + PARTS, blocks, PARTS)
        a = tl.load(a_at + block[:, None, None] * 128)
        w = tl.load(w_at + block[:, None, None] * 128)
        # scales are loaded a pass ahead, else each pass would wait for them
        scale = tl.where(in_k, w_scale, 0.0)[:, None]
        w_scale = tl.load(w_scale_at + ahead)
        if QUANTIZE:
            x = a.to(tl.float32)
            row_scale, inverse = ue8m0(tl.max(tl.abs(x), 2))
            scale = row_scale * scale
            a = to_e4m3(x * inverse[:, :, None], FP8)
            if FP8:
                a = a.to(tl.float8e4nv, bitcast=True)
        elif QUANT:
            scale = a_scale * scale
            a_scale = tl.load(a_scale_at + ahead[:, None])
        acc += _product(w, tl.permute(a, (0, 2, 1)), QUANT, FP8) * scale[:, None, :]
    y = tl.trans(tl.sum(acc, 0))
    tl.store(y_ptr + t[:, None] * N + n[None, :], to_bf16(y), mask=t_ok[:, None] & n_ok[None, :])


@triton.jit
def tile_kernel(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, y_ptr, num_rows, N, K, splits,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    QUANT: tl.constexpr, FP8: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of one split of it, for many tokens, which are the M side.

    a [T, K] e4m3 with scales [T, K/128], or bf16 (not QUANT); w [N, K]; y bf16 [T, N] or f32 [splits, T, N] (PARTIAL).
    BLOCK_N divides 128: a tile has one weight scale per block.

    COLUMNS of the tile are multiplied at a time: a product stands in registers beside the sums of all columns until it
    is scaled, and with half of them two programs of [128, 128] have room on an SM90. Addresses go on by a step in each
    pass, and places inside of a tile have 32 bits: registers are short.
    """
    wait_for_inputs()
    split = tl.program_id(1)
    tiles_t = tl.cdiv(num_rows, BLOCK_T)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (GROUP * tiles_n)
    first = band * GROUP
    width = tl.minimum(tiles_t - first, GROUP)
    tile_t = first + (pid % (GROUP * tiles_n)) % width
    tile_n = (pid % (GROUP * tiles_n)) // width
    PARTS: tl.constexpr = BLOCK_N // COLUMNS
    first_t, first_n = tile_t * BLOCK_T, tile_n * BLOCK_N
    t, n, k = tl.arange(0, BLOCK_T), tl.arange(0, COLUMNS), tl.arange(0, 128)
    t_ok = t < num_rows - first_t
    blocks = K // 128
    # rows past the end read the last one and are not stored
    a_at = (tl.minimum(t, num_rows - first_t - 1)[:, None] * K + k[None, :]).to(tl.uint32)
    a_scale_at = (tl.minimum(t, num_rows - first_t - 1) * blocks).to(tl.uint32)
    w_at = ()
    for part in tl.static_range(PARTS):
        of_part = part * COLUMNS + n
        w_at += ((tl.minimum(of_part, N - first_n - 1)[:, None] * K + k[None, :]).to(tl.uint32),)
    a_tile = a_ptr + first_t.to(tl.int64) * K
    w_tile = w_ptr + first_n.to(tl.int64) * K
    a_scale_tile = a_scale_ptr + first_t.to(tl.int64) * blocks
    w_scale_tile = w_scale_ptr + (first_n // 128).to(tl.int64) * blocks

    per_split = tl.cdiv(blocks, splits)
    start = split * per_split
    end = tl.minimum(start + per_split, blocks)
    a_tile += start * 128
    w_tile += start * 128
    sums = ()
    for _ in tl.static_range(PARTS):
        sums += (tl.zeros([BLOCK_T, COLUMNS], tl.float32),)
    ahead = tl.minimum(start, blocks - 1)  # the last split may have nothing to do
    w_scale = tl.load(w_scale_tile + ahead)
    if QUANT:
        a_scale = tl.load(a_scale_tile + ahead + a_scale_at)
    for block in range(start, end):
        a = tl.load(a_tile + a_at)
        # scales are loaded a pass ahead, else each pass would wait for them
        ahead = tl.minimum(block + 1, end - 1)
        scale = w_scale
        w_scale = tl.load(w_scale_tile + ahead)
        if QUANT:
            scale = a_scale * scale
            a_scale = tl.load(a_scale_tile + ahead + a_scale_at)
        added = ()  # a tuple that is carried over the loop is made anew
        for part in tl.static_range(PARTS):
            w = tl.load(w_tile + w_at[part])
            product = _product(a, tl.trans(w), QUANT, FP8)
            if QUANT:
                product *= scale[:, None]
            else:
                product *= scale
            added += (sums[part] + product,)
        sums = added
        a_tile += 128
        w_tile += 128
    y_tile = y_ptr + (split * num_rows + first_t).to(tl.int64) * N + first_n
    for part in tl.static_range(PARTS):
        of_part = part * COLUMNS + n
        at = t[:, None] * N + of_part[None, :]
        mask = t_ok[:, None] & (of_part < N - first_n)[None, :]
        if PARTIAL:
            tl.store(y_tile + at, sums[part], mask=mask)
        else:
            tl.store(y_tile + at, to_bf16(sums[part]), mask=mask)


@triton.jit
def _product(a, b, QUANT: tl.constexpr, FP8: tl.constexpr):
    if QUANT and FP8:
        return tl.dot(a, b)
    return dot_f32(widen(a, FP8), widen(b, FP8))


@triton.jit
def combine_splits_kernel(part_ptr, y_ptr, num_elements, splits, BLOCK: tl.constexpr):
    """f32 [splits, T·N] -> bf16 [T·N]: splits added in order, rounded once."""
    wait_for_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + split * num_elements + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, to_bf16(total), mask=mask)
