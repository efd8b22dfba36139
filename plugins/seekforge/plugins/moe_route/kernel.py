"""Router: one launch picks the experts of four tokens per program, all in f32 registers.

logits f32 [T, E], bias f32 [E] -> ids i32 [T, TOP_K], weights f32 [T, TOP_K]. All SMs; bound by launch latency below
some 2,048 tokens. Every selection is one integer maximum over (score, lowest position first), so ties have one winner
and a row of NaN still gives TOP_K different experts: an id that is no expert would be an illegal address later.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import wait_for_inputs


@triton.jit
def _order(x):
    """Map f32 to i64 whose order is that of the floats; -0 equals +0, NaN is the lowest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return tl.where(x != x, 0, key)


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, num_tokens, scale,
    E: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP_K: tl.constexpr, K_PAD: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Route ROWS tokens. E and GROUPS are powers of two."""
    wait_for_inputs()
    SIZE: tl.constexpr = E // GROUPS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_tokens
    expert = tl.arange(0, E)
    x = tl.load(logits_ptr + row[:, None].to(tl.int64) * E + expert[None, :], mask=valid[:, None], other=0.0)
    score = 1.0 / (1.0 + tl.exp(-x))
    biased = score + tl.load(bias_ptr + expert)[None, :]
    # key = (score, position from the end); group members first, the group itself after
    key = _order(biased) * 65536 + (65535 - expert)[None, :]

    grouped = tl.reshape(biased, [ROWS, GROUPS, SIZE])
    group_key = tl.reshape(key, [ROWS, GROUPS, SIZE])
    best = tl.max(group_key, 2)
    is_best = group_key == best[:, :, None]
    second = group_key == tl.max(tl.where(is_best, -1, group_key), 2)[:, :, None]
    group_score = tl.sum(tl.where(is_best, grouped, 0.0), 2) + tl.sum(tl.where(second, grouped, 0.0), 2)
    left = _order(group_score) * 65536 + (65535 - tl.arange(0, GROUPS))[None, :]
    kept = tl.zeros([ROWS, GROUPS], tl.int1)
    for _ in tl.static_range(TOPK_GROUPS):
        hit = left == tl.max(left, 1)[:, None]
        kept = kept | hit
        left = tl.where(hit, -1, left)

    # outside the kept groups: below every real score, still in order of position
    key = tl.reshape(tl.where(kept[:, :, None], group_key + 65536, group_key % 65536), [ROWS, E])
    column = tl.arange(0, K_PAD)
    ids = tl.zeros([ROWS, K_PAD], tl.int32)
    weights = tl.zeros([ROWS, K_PAD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(TOP_K):
        best = tl.max(key, 1)
        hit = key == best[:, None]
        key = tl.where(hit, -1, key)
        weight = tl.sum(tl.where(hit, score, 0.0), 1)
        total += weight
        ids = tl.where((column == j)[None, :], (65535 - best % 65536).to(tl.int32)[:, None], ids)
        weights = tl.where((column == j)[None, :], weight[:, None], weights)
    if NORM:
        weights = weights / (total + 1e-20)[:, None]
    at = row[:, None].to(tl.int64) * TOP_K + column[None, :]
    mask = valid[:, None] & (column < TOP_K)[None, :]
    tl.store(ids_ptr + at, ids, mask=mask)
    tl.store(weights_ptr + at, weights * scale, mask=mask)
