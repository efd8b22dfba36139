"""Sparse MLA: one latent key and value per chosen position, shared by all heads (spec §3.5).

One program: one query row x BLOCK_H heads x COLUMNS of the latent x one split of the chosen positions. A position goes
through the block table to a slot, whose record (656 bytes for V3.2) is read as e4m3, scales and bf16, widened to bf16
tiles, and serves as key and as value. Where tensor memory or registers are scarce (APART), scales are not multiplied
with the tiles, but with scores and with the weights of the values: fewer products, and one rounding less. Softmax in
base 2, f32; the product with the values has bf16 weights and f32 sums. -1 anywhere, and whatever lies outside the pool,
is no key: such rows are loaded as 0, so what lies in unused slots never enters.
A program first looks for the last place of its row that holds a position, and splits cut what lies before it: behind it
there is nothing to do, which in a short context is most of TOPK. Decode is bound by latency and by the widening of
bytes, so positions are split over programs and a second launch combines them; long prompts first expand each sequence's
cache to bf16 once (`expand_kernel`), since thousands of rows share it.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import dot_f32, from_e4m3, to_bf16, wait_for_inputs


@triton.jit
def _latents(record, column, valid, C: tl.constexpr, FP8: tl.constexpr):
    """Return bf16 [rows, C] of fp8_ds records at addresses `record` [rows]; 0 where not valid."""
    TILES: tl.constexpr = C // 128
    ROWS: tl.constexpr = record.shape[0]
    at = record[:, None] + column[None, :]
    if FP8:
        code = tl.load(at.to(tl.pointer_type(tl.float8e4nv)), mask=valid[:, None], other=0.0)
    else:
        code = tl.load(at, mask=valid[:, None], other=0)
    scales = (record + C).to(tl.pointer_type(tl.float32))
    scale = tl.load(scales[:, None] + tl.arange(0, TILES)[None, :], mask=valid[:, None], other=0.0)
    value = tl.reshape(from_e4m3(code, FP8), [ROWS, TILES, 128]) * scale[:, :, None]
    return to_bf16(tl.reshape(value, [ROWS, C]))


@triton.jit
def _slots(index, table_ptr, num_slots, num_blocks, LINEAR: tl.constexpr):
    """Return (slot i64, valid) of logical positions."""
    if LINEAR:
        slot = index.to(tl.int64)
        valid = (index >= 0) & (slot < num_slots)
    else:
        valid = (index >= 0) & (index // 64 < num_blocks)
        index = tl.where(valid, index, 0)
        block = tl.load(table_ptr + index // 64, mask=valid, other=0).to(tl.int64)
        slot = block * 64 + index % 64
        valid = valid & (slot >= 0) & (slot < num_slots)
    return tl.where(valid, slot, 0), valid


@triton.jit
def _places(topk_ptr, TOPK, BLOCK: tl.constexpr):
    """Return how many places of a row there are up to the last that holds a position."""
    last = 0
    for start in tl.range(0, TOPK, BLOCK, num_stages=1):  # a pipeline would take shared memory from the main loop
        at = start + tl.arange(0, BLOCK)
        index = tl.load(topk_ptr + at, mask=at < TOPK, other=-1)
        last = tl.maximum(last, tl.max(tl.where(index >= 0, at + 1, 0), 0))
    return last


@triton.jit
def _codes(record, column, valid, FP8: tl.constexpr):
    """Return f32 [rows, columns] of the codes of fp8_ds records, without their scales; 0 where not valid."""
    at = record[:, None] + column[None, :]
    if FP8:
        code = tl.load(at.to(tl.pointer_type(tl.float8e4nv)), mask=valid[:, None], other=0.0)
    else:
        code = tl.load(at, mask=valid[:, None], other=0)
    return from_e4m3(code, FP8)


@triton.jit
def attend_kernel(
    q_ptr, q_pe_ptr, cache_ptr, table_ptr, topk_ptr, out_ptr, lse_ptr,
    num_slots, num_blocks, TOPK, first_row, rows_per_sequence, splits, scale_log2,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr, FP8: tl.constexpr, PARTIAL: tl.constexpr, LINEAR: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """q bf16 [rows, H, C], q_pe [rows, H, R], topk i32 [rows, TOPK] -> out.

    out: bf16 [rows, H, C]; PARTIAL: f32 [rows, splits, H, C] and lse (base 2) [rows, splits, H]. A split without keys
    writes -inf to lse alone. A program's grid: (row, heads x columns, split). It loads its columns of a key first, and
    all of them in tiles of WIDTH: of fp8_ds, 128, which have one scale, or all.
    """
    wait_for_inputs()
    TILES: tl.constexpr = C // WIDTH
    PARTS: tl.constexpr = C // COLUMNS
    SCALED: tl.constexpr = BYTES and WIDTH == 128
    SUMS: tl.constexpr = COLUMNS // WIDTH
    row = tl.program_id(0).to(tl.int64) + first_row
    split = tl.program_id(2)
    h = tl.program_id(1) // PARTS * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(1) % PARTS * SUMS
    h_ok = h < H
    column = tl.arange(0, WIDTH)
    rope = tl.arange(0, R)
    steps = tl.cdiv(_places(topk_ptr + row * TOPK, TOPK, BLOCK_K), BLOCK_N)
    per_split = tl.cdiv(steps, splits)
    start = split * per_split
    works = h < tl.where(start < steps, H, 0)
    queries = q_ptr + (row * H + h)[:, None] * C + column[None, :]
    q = ()
    for t in tl.static_range(TILES):
        q += (tl.load(queries + (first + t) % TILES * WIDTH, mask=works[:, None], other=0.0),)
    q_pe = tl.load(q_pe_ptr + (row * H + h)[:, None] * R + rope[None, :], mask=works[:, None], other=0.0)
    table = table_ptr + row // rows_per_sequence * num_blocks

    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = ()
    for _ in tl.static_range(SUMS):
        acc += (tl.zeros([BLOCK_H, WIDTH], tl.float32),)
    for step in range(start, tl.minimum(start + per_split, steps)):
        at = step * BLOCK_N + tl.arange(0, BLOCK_N)
        index = tl.load(topk_ptr + row * TOPK + at, mask=at < TOPK, other=-1)
        slot, valid = _slots(index, table, num_slots, num_blocks, LINEAR)
        if BYTES:
            record = cache_ptr + slot * (C + C // 32 + 2 * R)
            ropes = (record + C + C // 32).to(tl.pointer_type(tl.bfloat16))
        else:
            record = cache_ptr + slot * (C + R)
            ropes = record + C
        k_pe = tl.load(ropes[:, None] + rope[None, :], mask=valid[:, None], other=0.0)
        k = ()
        scale = ()
        if SCALED:
            tile = tl.arange(0, TILES)[None, :]
            scale_at = (record + C).to(tl.pointer_type(tl.float32))[:, None] + (first + tile) % TILES
            scales = tl.load(scale_at, mask=valid[:, None], other=0.0)
            for t in tl.static_range(TILES):
                scale += (tl.sum(tl.where(tile == t, scales, 0.0), 1),)
        if APART:
            s = dot_f32(q_pe, tl.trans(k_pe))
            for t in tl.static_range(TILES):
                k += (to_bf16(_codes(record + (first + t) % TILES * WIDTH, column, valid, FP8)),)
                s += dot_f32(q[t], tl.trans(k[t])) * scale[t][None, :]
        else:
            for t in tl.static_range(TILES):
                if SCALED:
                    codes = _codes(record + (first + t) % TILES * WIDTH, column, valid, FP8)
                    k += (to_bf16(codes * scale[t][:, None]),)
                elif BYTES:
                    k += (_latents(record, column, valid, C, FP8),)
                else:
                    at_tile = record + (first + t) % TILES * WIDTH
                    k += (tl.load(at_tile[:, None] + column[None, :], mask=valid[:, None], other=0.0),)
                s = dot_f32(q[t], tl.trans(k[t]), s) if t > 0 else dot_f32(q[t], tl.trans(k[t]))
            s = dot_f32(q_pe, tl.trans(k_pe), s)
        if BLOCK_H >= 64:
            # what a reduction gives is moved to the scores' layout, what loads give would be loaded there once more
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
            share = to_bf16(p * scale[t][None, :] if APART else p)
            sums += (dot_f32(share, k[t], acc[t] * alpha[:, None]),)
        acc = sums
        m = m_new
    any_key = total != 0.0  # also true for NaN, which must stay visible
    if PARTIAL:
        part = (row * splits + split) * H + h
        out = out_ptr + part[:, None] * C + column[None, :]
        lse = tl.where(any_key, m + tl.log2(tl.where(any_key, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + part, lse, mask=h < tl.where(first == 0, H, 0))
    else:
        out = out_ptr + (row * H + h)[:, None] * C + column[None, :]
    for t in tl.static_range(SUMS):
        value = tl.where(any_key[:, None], acc[t] / tl.where(any_key, total, 1.0)[:, None], 0.0)
        if PARTIAL:
            tl.store(out + (first + t) * WIDTH, value, mask=works[:, None])
        else:
            tl.store(out + (first + t) * WIDTH, to_bf16(value), mask=h_ok[:, None])


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, splits, H: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Add the splits of one row and head, each with its share of the softmax; no key anywhere gives 0.

    All of them are loaded at once; of a split without keys, whose lse is -inf, nothing else is read.
    """
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPLITS)
    part = (row * splits + split) * H + h
    lse = tl.load(lse_ptr + part, mask=split < splits, other=float("-inf"))
    some = lse != float("-inf")  # also true for NaN, which must stay visible
    value = tl.load(part_ptr + part[:, None] * C + column[None, :], mask=some[:, None], other=0.0)
    m = tl.max(lse, 0)
    share = tl.where(some, tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m)), 0.0)
    total = tl.sum(share, 0)
    acc = tl.sum(share[:, None] * value, 0)
    acc = tl.where(total != 0.0, acc / tl.where(total != 0.0, total, 1.0), 0.0)
    tl.store(out_ptr + (row * H + h) * C + column, to_bf16(acc))


@triton.jit
def expand_kernel(
    cache_ptr, table_ptr, out_ptr, num_slots, num_blocks, sequence,
    C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """fp8_ds records of one sequence of the batch -> bf16 [num_blocks·64, C + R] in logical order. Bound by memory."""
    wait_for_inputs()
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    table = table_ptr + sequence.to(tl.int64) * num_blocks
    slot, valid = _slots(position, table, num_slots, num_blocks, False)
    column = tl.arange(0, C)
    rope = tl.arange(0, R)
    record = cache_ptr + slot * (C + C // 32 + 2 * R)
    ropes = (record + C + C // 32).to(tl.pointer_type(tl.bfloat16))
    out = out_ptr + position.to(tl.int64) * (C + R)
    inside = position < num_blocks * 64
    latents = _latents(record, column, valid, C, FP8)
    tl.store(out[:, None] + column[None, :], latents, mask=inside[:, None])
    k_pe = tl.load(ropes[:, None] + rope[None, :], mask=valid[:, None], other=0.0)
    tl.store(out[:, None] + C + rope[None, :], k_pe, mask=inside[:, None])
