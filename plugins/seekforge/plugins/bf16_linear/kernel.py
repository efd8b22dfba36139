"""Linear of bf16 operands with f32 results: y = x · Wᵀ (spec §5.3).

TensorRT multiplies bf16 only into bf16, and given an f32 weight reads twice the bytes: 3.7 GB for DeepSeek-V3.2's head,
which bounds the time of its product in a decode step. Products of bf16 are exact in f32, and tensor cores add them in
f32; no TF32 is involved. A small weight and a token or some (`narrow_kernel`): each program has 8 or 16 rows of the
weight and all of K, a part of it in each warp, so there is one launch and no sum afterwards. More (`linear_kernel`):
one GEMM for two shapes. Few tokens (`SWAP`): weight rows are the M side. Many tokens: square tiles, rows in groups of 8
for L2. K of a weight of few tiles is cut into splits until every SM streams a part of it; a second launch adds the
splits in order.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import dot_f32, wait_for_inputs

__all__ = ["add_splits_kernel", "linear_kernel", "narrow_kernel"]


@triton.jit
def narrow_kernel(
    x_ptr, w_ptr, y_ptr, num_rows, N, K,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Few out features of y [T, N] f32 for all rows, T <= BLOCK_T; a warp has every `PARTS`-th block along K."""
    wait_for_inputs()
    t = tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    t_ok, n_ok = t < num_rows, n < N
    # rows past the end read row 0 and are not stored: no mask in the loop, so loads stay vectors
    x_at = x_ptr + tl.where(t_ok, t, 0)[None, :, None] * K + k[None, None, :]
    w_at = w_ptr + tl.where(n_ok, n, 0).to(tl.int64)[None, :, None] * K + k[None, None, :]
    blocks = K // BLOCK_K
    acc = tl.zeros([PARTS, BLOCK_N, BLOCK_T], tl.float32)
    for first in range(0, blocks, PARTS):
        block = first + tl.arange(0, PARTS)
        in_k = (block < blocks)[:, None, None]
        at = tl.where(in_k, block[:, None, None], 0) * BLOCK_K
        x = tl.load(x_at + at)
        w = tl.load(w_at + at)
        acc += tl.where(in_k, dot_f32(w, tl.permute(x, (0, 2, 1))), 0.0)
    y = tl.trans(tl.sum(acc, 0))
    tl.store(y_ptr + t[:, None] * N + n[None, :], y, mask=t_ok[:, None] & n_ok[None, :])


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, y_ptr, num_rows, N, K, splits,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """One tile of y [T, N] f32, or of one split of it: y is [splits, T, N]. x [T, K] and w [N, K] bf16."""
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

    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    t_ok, n_ok = t < num_rows, n < N
    # rows past the end read row 0 and are not stored: no mask in the loop, so loads stay vectors
    x_at = x_ptr + tl.where(t_ok, t, 0).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w_ptr + tl.where(n_ok, n, 0).to(tl.int64)[:, None] * K + k[None, :]

    blocks = K // BLOCK_K
    per_split = tl.cdiv(blocks, splits)
    start = split * per_split
    end = tl.minimum(start + per_split, blocks)
    if SWAP:
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for block in range(start, end):
        x = tl.load(x_at + block * BLOCK_K)
        w = tl.load(w_at + block * BLOCK_K)
        if SWAP:
            acc = dot_f32(w, tl.trans(x), acc)
        else:
            acc = dot_f32(x, tl.trans(w), acc)
    if SWAP:
        acc = tl.trans(acc)
    # inside a tile 32 bits are enough for N < 2^24: 64 bits a value would spill beside the sums
    tile_ptr = y_ptr + split.to(tl.int64) * num_rows * N + (tile_t * BLOCK_T).to(tl.int64) * N
    at = tl.arange(0, BLOCK_T)[:, None] * N + n[None, :]
    tl.store(tile_ptr + at, acc, mask=t_ok[:, None] & n_ok[None, :])


@triton.jit
def add_splits_kernel(part_ptr, y_ptr, num_elements, splits, BLOCK: tl.constexpr):
    """f32 [splits, T·N] -> f32 [T·N]: splits added in order."""
    wait_for_inputs()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + split * num_elements + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, total, mask=mask)
