"""Dense MLA: one latent key and value per position up to the token's own, shared by all heads (spec §17.1).

One program: one query row x BLOCK_H heads x one split of the positions that the row sees, [0, its own]. How far that is
stands in memory, so the grid follows from shapes alone and a captured graph serves every length. A tile of BLOCK_N
positions lies in one block of the cache, whose number is one load; its rows of C + R bf16 serve as keys and, but for
the rotary part, as values. Softmax in base 2, f32; both products have bf16 factors and f32 sums. A block outside the
pool has no keys, and what lies behind the token's position is loaded as 0: neither ever enters a product.

Decode is bound by memory, 1,152 bytes a position, which few programs do not fetch fast enough: positions are split
until all rows' programs fill the card, and a second launch combines the parts. Prompts are bound by products: the heads
of one row are the rows of a tile, and rows that run together read the same keys from L2. Where sums of all columns
leave no registers (SM90), a program has half of the columns, and scores with all of them. All SMs.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import dot_f32, to_bf16, wait_for_inputs


@triton.jit
def attend_kernel(
    q_ptr, q_pe_ptr, cache_ptr, table_ptr, positions_ptr, out_ptr, lse_ptr,
    num_slots, num_blocks, rows_per_sequence, splits, scale_log2,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """q bf16 [rows, H, C], q_pe [rows, H, R], positions i64 [rows] -> out; a row of -1 sees no key and gives 0.

    out: bf16 [rows, H, C]; PARTIAL: f32 [rows, splits, H, C] and lse (base 2) [rows, splits, H]. A program's grid:
    (row, heads x columns, split). It loads its columns of a key first, and all of them in tiles of WIDTH.
    """
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    TILES: tl.constexpr = C // WIDTH
    PARTS: tl.constexpr = C // COLUMNS
    SUMS: tl.constexpr = COLUMNS // WIDTH
    h = tl.program_id(1) // PARTS * BLOCK_H + tl.arange(0, BLOCK_H)
    first_tile = tl.program_id(1) % PARTS * SUMS
    h_ok = h < H
    column = tl.arange(0, WIDTH)
    rope = tl.arange(0, R)
    queries = q_ptr + (row * H + h)[:, None] * C + column[None, :]
    q = ()
    for t in tl.static_range(TILES):
        q += (tl.load(queries + (first_tile + t) % TILES * WIDTH, mask=h_ok[:, None], other=0.0),)
    q_pe = tl.load(q_pe_ptr + (row * H + h)[:, None] * R + rope[None, :], mask=h_ok[:, None], other=0.0)
    table = table_ptr + row // rows_per_sequence * num_blocks
    last = tl.minimum(tl.load(positions_ptr + row), num_blocks * 64 - 1)
    keys = (tl.maximum(last, -1) + 1).to(tl.int32)

    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = ()
    for _ in tl.static_range(SUMS):
        acc += (tl.zeros([BLOCK_H, WIDTH], tl.float32),)
    steps = tl.cdiv(keys, BLOCK_N)
    per_split = tl.cdiv(steps, splits)
    start = split * per_split
    for step in range(start, tl.minimum(start + per_split, steps)):
        first = step * BLOCK_N
        at = first + tl.arange(0, BLOCK_N)
        slot = tl.load(table + first // 64).to(tl.int64) * 64 + at % 64
        valid = (at < keys) & (slot >= 0) & (slot < num_slots)
        record = cache_ptr + tl.where(valid, slot, 0) * (C + R)
        k_pe = tl.load(record[:, None] + C + rope[None, :], mask=valid[:, None], other=0.0)
        k = ()
        for t in tl.static_range(TILES):
            at_tile = record + (first_tile + t) % TILES * WIDTH
            k += (tl.load(at_tile[:, None] + column[None, :], mask=valid[:, None], other=0.0),)
            if t == 0:
                s = dot_f32(q[t], tl.trans(k[t]))
            else:
                s = dot_f32(q[t], tl.trans(k[t]), s)
        s = dot_f32(q_pe, tl.trans(k_pe), s)
        if BLOCK_H >= 64:  # else the table would be loaded once more, in the layout of scores
            marks = valid[:, None] & (tl.arange(0, 4) >= 0)[None, :]
            valid = tl.max(marks.to(tl.int32), 1) > 0
        s = tl.where(valid[None, :], s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        total = total * alpha + tl.sum(p, 1)
        sums = ()  # a tuple that is carried over the loop is made anew
        for t in tl.static_range(SUMS):
            sums += (dot_f32(to_bf16(p), k[t], acc[t] * alpha[:, None]),)
        acc = sums
        m = m_new
    any_key = total != 0.0  # also true for NaN, which must stay visible
    if PARTIAL:
        part = (row * splits + split) * H + h
        out = out_ptr + part[:, None] * C + column[None, :]
        lse = tl.where(any_key, m + tl.log2(tl.where(any_key, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + part, lse, mask=h < tl.where(first_tile == 0, H, 0))
    else:
        out = out_ptr + (row * H + h)[:, None] * C + column[None, :]
    for t in tl.static_range(SUMS):
        value = tl.where(any_key[:, None], acc[t] / tl.where(any_key, total, 1.0)[:, None], 0.0)
        if PARTIAL:
            tl.store(out + (first_tile + t) * WIDTH, value, mask=h_ok[:, None])
        else:
            tl.store(out + (first_tile + t) * WIDTH, to_bf16(value), mask=h_ok[:, None])


@triton.jit
def combine_kernel(part_ptr, lse_ptr, out_ptr, splits, H: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """Add the parts of one row and head, each with its share of the softmax, PARTS at a time; no key anywhere gives 0.

    A row has up to 128 parts: one after another they would cost as many waits for memory.
    """
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    column = tl.arange(0, C)
    m = float("-inf")
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        lse = tl.load(lse_ptr + (row * splits + split) * H + h, mask=split < splits, other=float("-inf"))
        m = tl.maximum(m, tl.max(lse, 0))
    base = tl.where(m == float("-inf"), 0.0, m)
    total = 0.0
    acc = tl.zeros([C], tl.float32)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        part = (row * splits + split) * H + h
        share = tl.exp2(tl.load(lse_ptr + part, mask=split < splits, other=float("-inf")) - base)
        values = tl.load(part_ptr + part[:, None] * C + column[None, :], mask=(split < splits)[:, None], other=0.0)
        total += tl.sum(share, 0)
        acc += tl.sum(share[:, None] * values, 0)
    acc = tl.where(total != 0.0, acc / tl.where(total != 0.0, total, 1.0), 0.0)
    tl.store(out_ptr + (row * H + h) * C + column, to_bf16(acc))
