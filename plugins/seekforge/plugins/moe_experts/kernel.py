"""Routed experts: group assignments on the device, two grouped FP8 products, and an ordered sum (spec §4).

An assignment is one (token, slot). `count_kernel` and `place_kernel` sort them by expert, stably, by counting: many
programs, each with a run of assignments. No host synchronization: grids depend on the number of tokens alone, and tiles
past the end find expert -1 and stop. `up_kernel` multiplies a token's quantized row with 128 gate and the matching 128
up columns, and since these are one scale block, forms SwiGLU and requantizes in its epilogue. `down_kernel` gives each
assignment's bf16 row; `combine_kernel` adds a token's rows in slot order in f32, so the result does not depend on what
else is in the batch. Bound by reading the weights of the experts that are hit: row tiles of one expert are neighbors.
Few rows per expert (`SWAP`): weight rows are the M side. An id outside [0, E) is no assignment: it sorts nowhere and
adds nothing.

Few tokens seldom share an expert, so nothing is grouped: `narrow_up_kernel` has one assignment and a few rows of its
expert, `narrow_down_kernel` a token and a few rows of each of its experts, which it adds in slot order. All of K is in
one program, a part in each warp, and rows that do not come quantized are quantized as they are read. Two launches
instead of five.

A shared expert, whose weights are two tensors of their own, has every token, and weight 1. Its rows stand behind all
assignments and its tiles behind theirs, so nothing sorts them; it is added last. It may be narrower than the others, as
where ranks share it and not them, and its rows have the others' stride all the same.

NVFP4 weights (`NVFP4`) are bytes, a row of K values its K / 2 bytes of codes and behind them its K / 16 e4m3 scales.
A code times its scale has six significant bits and is 2^-10 to 2688, so f16 holds it exactly, as it does e4m3 rows:
products are those of f16, and nothing but f32 sums rounds. Rows that are not quantized are bf16, which holds those
weights too. The scale of a 128×128 block multiplies sums as an FP8 weight's does.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import (
    INTERPRET,
    dot_f32,
    from_e4m3,
    k_blocks,
    quantize_kernel,
    round_bf16,
    to_bf16,
    to_e4m3,
    ue8m0,
    wait_for_inputs,
    widen,
)

__all__ = [
    "combine_kernel",
    "count_kernel",
    "down_kernel",
    "narrow_down_kernel",
    "narrow_up_kernel",
    "place_kernel",
    "quantize_kernel",
    "up_kernel",
]


@triton.jit
def _experts(ids_ptr, at, num_assignments, E: tl.constexpr):
    """Return (expert of each assignment, whether it is one)."""
    expert = tl.load(ids_ptr + at, mask=at < num_assignments, other=-1)
    return expert, (expert >= 0) & (expert < E)


@triton.jit
def count_kernel(ids_ptr, count_ptr, num_assignments, E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """ids i32 [A] -> count i32 [A / CHUNK, BINS]: assignments of each expert in each run of CHUNK."""
    wait_for_inputs()
    chunk = tl.program_id(0)
    expert, ok = _experts(ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), num_assignments, E)
    counts = tl.histogram(tl.where(ok, expert, 0), BINS, mask=ok)
    tl.store(count_ptr + chunk * BINS + tl.arange(0, BINS), counts)


@triton.jit
def place_kernel(
    ids_ptr, count_ptr, order_ptr, place_ptr, tile_ptr, num_assignments, max_tiles, block_m,
    E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ids i32 [A] -> order [A] (sorted row -> assignment), place [A] (its inverse, -1), tiles [3, max_tiles].

    A tile is (expert or -1, first sorted row, end of the expert's rows). One program: a run of CHUNK assignments, and
    of every expert each tile whose number within it is the program's, modulo the number of programs. A program adds up
    the counts by itself, ROWS runs at a time: that is cheaper than one more launch. One run has no counts before it.
    """
    wait_for_inputs()
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    bins, lane = tl.arange(0, BINS), tl.arange(0, CHUNK)
    at = chunk * CHUNK + lane
    expert, ok = _experts(ids_ptr, at, num_assignments, E)
    before = tl.zeros([BINS], tl.int32)
    counts = tl.zeros([BINS], tl.int32)
    if chunks == 1:
        counts = tl.histogram(tl.where(ok, expert, 0), BINS, mask=ok)
    else:
        for runs in range(0, chunks, ROWS):
            run = runs + tl.arange(0, ROWS)
            found = tl.load(count_ptr + run[:, None] * BINS + bins[None, :], mask=run[:, None] < chunks, other=0)
            counts += tl.sum(found, 0)
            before += tl.sum(tl.where(run[:, None] < chunk, found, 0), 0)
    ends = tl.cumsum(counts, 0)
    starts = ends - counts

    earlier = tl.zeros([CHUNK], tl.int32)
    for part in tl.static_range(CHUNK // COLUMNS):
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        other, _ = _experts(ids_ptr, chunk * CHUNK + column, num_assignments, E)
        earlier += tl.sum(((other[None, :] == expert[:, None]) & (column[None, :] < lane[:, None])).to(tl.int32), 1)
    place = tl.gather(starts + before, tl.where(ok, expert, 0), 0) + earlier
    tl.store(place_ptr + at, tl.where(ok, place, -1), mask=at < num_assignments)
    tl.store(order_ptr + place, at, mask=ok)

    tiles = (counts + block_m - 1) // block_m
    tile_ends = tl.cumsum(tiles, 0)
    for number in range(chunk, tl.max(tiles, 0), chunks):
        tile = tile_ends - tiles + number
        mine = number < tiles
        tl.store(tile_ptr + tile, bins, mask=mine)
        tl.store(tile_ptr + max_tiles + tile, starts + number * block_m, mask=mine)
        tl.store(tile_ptr + 2 * max_tiles + tile, ends, mask=mine)
    for empty in range(tl.sum(tiles, 0) + chunk * CHUNK, max_tiles, chunks * CHUNK):
        tl.store(tile_ptr + empty + lane, -1, mask=empty + lane < max_tiles)


@triton.jit
def _e2m1(code):
    """Return the value of e2m1 codes, i32 below 16, as f32: as exponent and mantissa of f32 it is 2^126 too small."""
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126; a subnormal f32 of 0.5 stays exact


@triton.jit
def _times_scale(byte, scale):
    """Return (low, high) f16: the e2m1 codes of bytes [.., N] times their e4m3 scales, bytes of the same shape; exact.

    The GPU widens both codes of a byte by one instruction; four bytes that share a register share a scale.
    """
    if INTERPRET:
        code, factor = byte.to(tl.int32), from_e4m3(scale, False)
        low = (_e2m1(code & 15) * factor).to(tl.float16)
        high = (_e2m1(code >> 4) * factor).to(tl.float16)
    else:
        both = tl.inline_asm_elementwise(
            """{
            .reg .b8 code<4>;
            .reg .b16 first, rest;
            .reg .b32 scale, value<4>;
            mov.b32 {first, rest}, $5;
            cvt.rn.f16x2.e4m3x2 scale, first;
            mov.b32 {code0, code1, code2, code3}, $4;
            cvt.rn.f16x2.e2m1x2 value0, code0;
            cvt.rn.f16x2.e2m1x2 value1, code1;
            cvt.rn.f16x2.e2m1x2 value2, code2;
            cvt.rn.f16x2.e2m1x2 value3, code3;
            mul.rn.f16x2 $0, value0, scale;
            mul.rn.f16x2 $1, value1, scale;
            mul.rn.f16x2 $2, value2, scale;
            mul.rn.f16x2 $3, value3, scale;
            }""",
            "=r,=r,=r,=r,r,r", [byte, scale], dtype=tl.uint32, is_pure=True, pack=4,
        )  # fmt: skip
        low = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def _nvfp4(row_at, block, K: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Return blocks `block` of 128 columns of NVFP4 rows at `row_at`, both [PARTS, ROWS] or less: as many exact f16."""
    byte = tl.load((row_at + block * 64)[:, :, None] + tl.arange(0, 64)[None, None, :])
    scale = tl.load((row_at + block * 8)[:, :, None] + K // 2 + tl.arange(0, 8)[None, None, :])
    scale = tl.reshape(tl.broadcast_to(scale[:, :, :, None], [PARTS, ROWS, 8, 8]), [PARTS, ROWS, 64])
    low, high = _times_scale(byte, scale)
    return tl.reshape(tl.join(low, high), [PARTS, ROWS, 128])


@triton.jit
def _weight(tile, rows, block, K: tl.constexpr, NVFP4: tl.constexpr):
    """Return block `block` of 128 columns of weight rows that begin at `tile` + `rows` [128]: as they are, or NVFP4."""
    if NVFP4:
        weight = tl.reshape(_nvfp4((tile + rows)[None, :], block, K, 1, 128), [128, 128])
    else:
        weight = tl.load(tile + block * 128 + (rows[:, None] + tl.arange(0, 128)[None, :]))
    return weight


@triton.jit
def _factors(rows, weight, QUANT: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr):
    """Return both factors of a product in one type, exact: e4m3 as they are, f16 beside NVFP4 weights, or bf16."""
    if QUANT and NVFP4:
        rows = rows.to(tl.float16)
    elif not (QUANT and FP8):
        rows = widen(rows, FP8)
        weight = widen(weight, FP8)
    return rows, weight


@triton.jit
def _dot(a, b):
    """Matrix product with f32 sums of two factors of one type."""
    if a.dtype == tl.float8e4nv:
        return tl.dot(a, b)
    return dot_f32(a, b)


@triton.jit
def _product(rows, weight, acc_scale, SWAP: tl.constexpr, QUANT: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr):
    """One 128 block of rows [M, 128] · weight [128, 128]ᵀ, scaled; transposed when SWAP. acc_scale: [M] or a scalar."""
    rows, weight = _factors(rows, weight, QUANT, FP8, NVFP4)
    if SWAP:
        part = _dot(weight, tl.trans(rows))
    else:
        part = _dot(rows, tl.trans(weight))
    if QUANT:
        if SWAP:
            part = part * acc_scale[None, :]
        else:
            part = part * acc_scale[:, None]
    else:
        part = part * acc_scale
    return part


@triton.jit
def _tile(tile_ptr, max_tiles, num_assignments, TOPK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (expert or -1, first row, end of the rows, whether the shared expert's) of the program's tile."""
    tile = tl.program_id(0)
    routed = tile < max_tiles
    expert = tl.load(tile_ptr + tile, mask=routed, other=0)
    shared_first = num_assignments + (tile - max_tiles) * BLOCK_M
    first = tl.load(tile_ptr + max_tiles + tile, mask=routed, other=shared_first)
    shared_end = num_assignments + num_assignments // TOPK
    end = tl.load(tile_ptr + 2 * max_tiles + tile, mask=routed, other=shared_end)
    return expert, first, end, tile >= max_tiles


@triton.jit
def up_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, shared_ptr, shared_scale_ptr, h_ptr, h_scale_ptr, order_ptr, tile_ptr,
    max_tiles, num_assignments, shared_inner,
    H: tl.constexpr, INNER: tl.constexpr, TOPK: tl.constexpr, BLOCK_M: tl.constexpr,
    SWAP: tl.constexpr, QUANT: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    """x [T, H] (e4m3 and scales, or bf16), w [E, 2I, H] -> h [A, I] in sorted order, e4m3 and scales, or bf16.

    With a shared [2S, H], S = `shared_inner` <= I, h has T rows more.
    """
    wait_for_inputs()
    expert, first, end, is_shared = _tile(tile_ptr, max_tiles, num_assignments, TOPK, BLOCK_M)
    inner = tl.where(is_shared, shared_inner, INNER)
    if (expert >= 0) & (tl.program_id(1) * 128 < inner):
        row = first + tl.arange(0, BLOCK_M)
        ok = row < end
        assignment = tl.load(order_ptr + row, mask=ok & (row < num_assignments), other=0)
        token = tl.where(ok & is_shared, row - num_assignments, assignment // TOPK)
        n, k = tl.arange(0, 128), tl.arange(0, 128)
        x_at = (token[:, None] * H + k[None, :]).to(tl.uint32)
        ROW: tl.constexpr = 9 * H // 16 if NVFP4 else H  # bytes
        rows = (n * ROW).to(tl.uint32)
        gate_tile = tl.where(is_shared, shared_ptr, w_ptr + expert.to(tl.int64) * (2 * INNER * ROW))
        gate_tile += tl.program_id(1) * (128 * ROW)
        up_tile = gate_tile + inner * ROW
        x_scale_at = (token * (H // 128)).to(tl.uint32)
        gate_scale_at = tl.where(is_shared, shared_scale_ptr, w_scale_ptr + expert * (2 * INNER // 128) * (H // 128))
        gate_scale_at += tl.program_id(1) * (H // 128)
        up_scale_at = gate_scale_at + inner // 128 * (H // 128)
        if SWAP:
            gate = tl.zeros([128, BLOCK_M], tl.float32)
            up = tl.zeros([128, BLOCK_M], tl.float32)
        else:
            gate = tl.zeros([BLOCK_M, 128], tl.float32)
            up = tl.zeros([BLOCK_M, 128], tl.float32)
        next_gate_scale, next_up_scale = tl.load(gate_scale_at), tl.load(up_scale_at)
        if QUANT:
            next_x_scale = tl.load(x_scale_ptr + x_scale_at)
        for block in range(H // 128):
            x = tl.load(x_ptr + block * 128 + x_at)
            # scales are loaded a pass ahead, else each pass would wait for them
            ahead = tl.minimum(block + 1, H // 128 - 1)
            gate_scale, up_scale = next_gate_scale, next_up_scale
            next_gate_scale, next_up_scale = tl.load(gate_scale_at + ahead), tl.load(up_scale_at + ahead)
            if QUANT:
                gate_scale = next_x_scale * gate_scale
                up_scale = next_x_scale * up_scale
                next_x_scale = tl.load(x_scale_ptr + ahead + x_scale_at)
            gate_weight = _weight(gate_tile, rows, block, H, NVFP4)
            gate += _product(x, gate_weight, gate_scale, SWAP, QUANT, FP8, NVFP4)
            up_weight = _weight(up_tile, rows, block, H, NVFP4)
            up += _product(x, up_weight, up_scale, SWAP, QUANT, FP8, NVFP4)
        if SWAP:
            gate = tl.trans(gate)
            up = tl.trans(up)
        # looked up once more, so that nothing of it takes registers in the loop
        _, first, end, _ = _tile(tile_ptr, max_tiles, num_assignments, TOPK, BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        ok = row < end
        gate = round_bf16(gate)
        h = round_bf16(gate / (1.0 + tl.exp(-gate)) * round_bf16(up))
        at = row[:, None].to(tl.int64) * INNER + tl.program_id(1) * 128 + n[None, :]
        if QUANT:
            scale, inverse = ue8m0(tl.max(tl.abs(h), 1))
            tl.store(h_ptr + at, to_e4m3(h * inverse[:, None], FP8), mask=ok[:, None])
            tl.store(h_scale_ptr + row.to(tl.int64) * (INNER // 128) + tl.program_id(1), scale, mask=ok)
        else:
            tl.store(h_ptr + at, to_bf16(h), mask=ok[:, None])


@triton.jit
def down_kernel(
    h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, shared_ptr, shared_scale_ptr, out_ptr, tile_ptr,
    max_tiles, num_assignments, shared_inner,
    H: tl.constexpr, INNER: tl.constexpr, TOPK: tl.constexpr, BLOCK_M: tl.constexpr,
    SWAP: tl.constexpr, QUANT: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    """h [A, I] in sorted order, w [E, H, I] -> out bf16 [A, H] in sorted order; with a shared [H, S], T rows more."""
    wait_for_inputs()
    expert, first, end, is_shared = _tile(tile_ptr, max_tiles, num_assignments, TOPK, BLOCK_M)
    if expert >= 0:
        inner = tl.where(is_shared, shared_inner, INNER)
        row = first + tl.arange(0, BLOCK_M)
        ok = row < end
        safe = tl.where(ok, row, first)
        n, k = tl.arange(0, 128), tl.arange(0, 128)
        h_at = (safe[:, None] * INNER + k[None, :]).to(tl.uint32)
        ROW: tl.constexpr = 9 * INNER // 16 if NVFP4 else INNER  # bytes
        row_bytes = ROW if NVFP4 else inner  # a shared expert is not NVFP4
        rows = (n * row_bytes).to(tl.uint32)
        w_tile = tl.where(is_shared, shared_ptr, w_ptr + expert.to(tl.int64) * (H * ROW))
        w_tile += tl.program_id(1) * (128 * row_bytes)
        h_scale_at = h_scale_ptr + safe * (INNER // 128)
        w_scale_at = tl.where(is_shared, shared_scale_ptr, w_scale_ptr + expert * (H // 128) * (INNER // 128))
        w_scale_at += tl.program_id(1) * (inner // 128)
        if SWAP:
            acc = tl.zeros([128, BLOCK_M], tl.float32)
        else:
            acc = tl.zeros([BLOCK_M, 128], tl.float32)
        next_scale = tl.load(w_scale_at)
        if QUANT:
            next_h_scale = tl.load(h_scale_at)
        for block in range(inner // 128):
            ahead = tl.minimum(block + 1, inner // 128 - 1)
            scale = next_scale
            next_scale = tl.load(w_scale_at + ahead)
            if QUANT:
                scale = next_h_scale * scale
                next_h_scale = tl.load(h_scale_at + ahead)
            h = tl.load(h_ptr + block * 128 + h_at)
            acc += _product(h, _weight(w_tile, rows, block, INNER, NVFP4), scale, SWAP, QUANT, FP8, NVFP4)
        if SWAP:
            acc = tl.trans(acc)
        out_at = row[:, None].to(tl.int64) * H + tl.program_id(1) * 128 + n[None, :]
        tl.store(out_ptr + out_at, to_bf16(acc), mask=ok[:, None])


@triton.jit
def combine_kernel(
    out_ptr, place_ptr, weight_ptr, y_ptr, shared_inner, H: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr
):
    """y f32 [T, H] = sum over slots, in order, of weight · out[place], and the shared expert's row, if there is one.

    Slots without an expert are left out.
    """
    wait_for_inputs()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(TOPK):
        place = tl.load(place_ptr + token * TOPK + slot).to(tl.int64)
        if place >= 0:
            weight = tl.load(weight_ptr + token * TOPK + slot)
            total += tl.load(out_ptr + place * H + column, mask=inside, other=0.0).to(tl.float32) * weight
    if shared_inner > 0:
        place = tl.num_programs(0).to(tl.int64) * TOPK + token
        total += tl.load(out_ptr + place * H + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * H + column, total, mask=inside)


@triton.jit
def _values(x_at, block, QUANTIZE: tl.constexpr, FP8: tl.constexpr):
    """Return blocks [PARTS] of a row, [PARTS, 128, 1], and scales: as they are and 1, or bf16 that is quantized."""
    x = tl.load(x_at + block[:, None] * 128 + tl.arange(0, 128)[None, :])
    scale = tl.full(block.shape, 1.0, tl.float32)
    if QUANTIZE:
        value = x.to(tl.float32)
        scale, inverse = ue8m0(tl.max(tl.abs(value), 1))
        x = to_e4m3(value * inverse[:, None], FP8)
        if FP8:
            x = x.to(tl.float8e4nv, bitcast=True)
    return x[:, :, None], scale


@triton.jit
def _narrow_product(
    x, weight_at, pitch, block, K: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    QUANT: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    """Blocks [PARTS] of ROWS weight rows `pitch` apart at `weight_at`, times x [PARTS, 128, 1] -> [PARTS, ROWS, 1].

    K: values of a row of NVFP4.
    """
    row_at = weight_at + tl.arange(0, ROWS)[None, :] * pitch
    if NVFP4:
        weight = _nvfp4(row_at, block[:, None], K, PARTS, ROWS)
    else:
        weight = tl.load(row_at[:, :, None] + (block[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]))
    x, weight = _factors(x, weight, QUANT, FP8, NVFP4)
    return _dot(weight, x)


@triton.jit
def _narrow_up(
    x_at, x_scale_at, weight_at, scale_at, h_at, inner,
    H: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    QUANT: tl.constexpr, QUANTIZE: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    """Write ROWS values of h at `h_at`: of gate rows at `weight_at`, and of up rows `inner` rows behind them."""
    gate = tl.zeros([PARTS, ROWS, 1], tl.float32)
    up = tl.zeros([PARTS, ROWS, 1], tl.float32)
    PITCH: tl.constexpr = 9 * H // 16 if NVFP4 else H
    up_at, up_scale_at = weight_at + inner * PITCH, scale_at + inner // 128 * (H // 128)
    ahead, _ = k_blocks(0, H // 128, PARTS)
    next_gate_scale, next_up_scale = tl.load(scale_at + ahead), tl.load(up_scale_at + ahead)
    if QUANT and not QUANTIZE:
        next_x_scale = tl.load(x_scale_at + ahead)
    for first in range(0, H // 128, PARTS):
        block, inside = k_blocks(first, H // 128, PARTS)
        x, scale = _values(x_at, block, QUANTIZE, FP8)
        # scales are loaded a pass ahead, else each pass would wait for them
        ahead, _ = k_blocks(first + PARTS, H // 128, PARTS)
        if QUANT and not QUANTIZE:
            scale = next_x_scale
            next_x_scale = tl.load(x_scale_at + ahead)
        scale = tl.where(inside, scale, 0.0)
        gate_scale, up_scale = scale * next_gate_scale, scale * next_up_scale
        next_gate_scale, next_up_scale = tl.load(scale_at + ahead), tl.load(up_scale_at + ahead)
        product = _narrow_product(x, weight_at, PITCH, block, H, ROWS, PARTS, QUANT, FP8, NVFP4)
        gate += product * gate_scale[:, None, None]
        product = _narrow_product(x, up_at, PITCH, block, H, ROWS, PARTS, QUANT, FP8, NVFP4)
        up += product * up_scale[:, None, None]
    g = round_bf16(tl.sum(gate, 0))
    h = g / (1.0 + tl.exp(-g)) * round_bf16(tl.sum(up, 0))
    tl.store(h_at + tl.arange(0, ROWS)[:, None], to_bf16(h))


@triton.jit
def _narrow_down(
    h_at, weight_at, scale_at, pitch, inner, INNER: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    QUANT: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    """Return ROWS values of an expert's row, [ROWS, 1], rounded to bf16, still as f32."""
    acc = tl.zeros([PARTS, ROWS, 1], tl.float32)
    ahead, _ = k_blocks(0, inner // 128, PARTS)
    next_scale = tl.load(scale_at + ahead)
    for first in range(0, inner // 128, PARTS):
        block, inside = k_blocks(first, inner // 128, PARTS)
        h, scale = _values(h_at, block, QUANT, FP8)
        scale = tl.where(inside, scale, 0.0) * next_scale
        ahead, _ = k_blocks(first + PARTS, inner // 128, PARTS)
        next_scale = tl.load(scale_at + ahead)
        product = _narrow_product(h, weight_at, pitch, block, INNER, ROWS, PARTS, QUANT, FP8, NVFP4)
        acc += product * scale[:, None, None]
    return round_bf16(tl.sum(acc, 0))


@triton.jit
def narrow_up_kernel(
    x_ptr, x_scale_ptr, ids_ptr, w_ptr, w_scale_ptr, shared_ptr, shared_scale_ptr, h_ptr, num_assignments, shared_inner,
    E: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, TOPK: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    QUANT: tl.constexpr, QUANTIZE: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    """x [T, H], w [E, 2I, H] -> h bf16 [A, I]: ROWS gate rows and the matching up rows of one assignment.

    x is e4m3 with scales, or bf16 that is quantized here (QUANTIZE) or not at all (not QUANT). With a shared [2S, H],
    S = `shared_inner` <= I, h has T rows more.
    """
    wait_for_inputs()
    assignment, first = tl.program_id(0), tl.program_id(1) * ROWS
    is_shared = assignment >= num_assignments
    expert = tl.load(ids_ptr + assignment, mask=assignment < num_assignments, other=0)
    inner = tl.where(is_shared, shared_inner, INNER)
    if (expert >= 0) & (expert < E) & (first < inner):
        token = tl.where(is_shared, assignment - num_assignments, assignment // TOPK)
        row = expert.to(tl.int64) * (2 * INNER)
        PITCH: tl.constexpr = 9 * H // 16 if NVFP4 else H  # bytes of a weight row
        weight_at = tl.where(is_shared, shared_ptr, w_ptr + row * PITCH) + first * PITCH
        scale_at = tl.where(is_shared, shared_scale_ptr, w_scale_ptr + row // 128 * (H // 128))
        _narrow_up(
            x_ptr + token * H, x_scale_ptr + token * (H // 128), weight_at, scale_at + first // 128 * (H // 128),
            h_ptr + assignment * INNER + first, inner, H, ROWS, PARTS, QUANT, QUANTIZE, FP8, NVFP4,
        )  # fmt: skip


@triton.jit
def narrow_down_kernel(
    h_ptr, ids_ptr, weight_ptr, w_ptr, w_scale_ptr, shared_ptr, shared_scale_ptr, y_ptr, shared_inner,
    E: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, TOPK: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, QUANT: tl.constexpr, FP8: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    """h bf16 [A, I], w [E, H, I] -> y f32 [T, H]: ROWS columns of one token, summed over its slots in order.

    A shared [H, S], S = `shared_inner` <= I, is one more slot behind them, whose weight is 1.
    """
    wait_for_inputs()
    first, token = tl.program_id(0) * ROWS, tl.program_id(1)
    total = tl.zeros([ROWS, 1], tl.float32)
    for slot in range(TOPK + tl.minimum(shared_inner, 1)):
        is_shared = slot >= TOPK
        assignment = token * TOPK + slot
        expert = tl.load(ids_ptr + assignment, mask=slot < TOPK, other=0)
        if (expert >= 0) & (expert < E):
            inner = tl.where(is_shared, shared_inner, INNER)
            row = expert.to(tl.int64) * H
            PITCH: tl.constexpr = 9 * INNER // 16 if NVFP4 else INNER
            pitch = PITCH if NVFP4 else inner  # a shared expert is not NVFP4
            weight_at = tl.where(is_shared, shared_ptr, w_ptr + row * PITCH) + first * pitch
            scale_at = tl.where(is_shared, shared_scale_ptr, w_scale_ptr + row // 128 * (INNER // 128))
            h_row = tl.where(is_shared, tl.num_programs(1) * TOPK + token, assignment)
            out = _narrow_down(
                h_ptr + h_row * INNER, weight_at, scale_at + first // 128 * (inner // 128),
                pitch, inner, INNER, ROWS, PARTS, QUANT, FP8, NVFP4,
            )  # fmt: skip
            total += out * tl.load(weight_ptr + assignment, mask=slot < TOPK, other=1.0)
    tl.store(y_ptr + token * H + first + tl.arange(0, ROWS)[:, None], total)
