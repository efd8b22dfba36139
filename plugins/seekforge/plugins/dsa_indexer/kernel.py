"""Lightning indexer: scores of every visible key, then the exact index_topk best of each row (spec §3.6, §3.7).

`scores_kernel`: one program takes ROWS query rows of one sequence (they share its keys) and a run of pages; queries are
quantized once per program, and ReLU, head weights and key scales are applied to a tile of 64 keys in f32.
`select_kernel`: one program per row. Scores become integers of the same order; three digits of 11, 11 and 10 bits
(histogram, count from above, pick) give the k-th largest exactly, and one ordered pass writes what is above it
and the first of what equals it: ascending, ties to the lowest position, no sort, no float atomics. Rows that see at
most index_topk keys take them all and read no score, so one CUDA graph serves all lengths.
`digit_kernel` and `emit_kernel` do the same with many programs per row, where rows are few: a launch for each digit
(12, 12 and 8 bits) and one that writes. Programs of a row add to its histograms of the first two digits, and sums of
integers do not depend on their order. Of the last digit each has its own, so that the next launch knows what comes
before each.
Scores of keys that a row does not see are never written and never read.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import (
    INTERPRET,
    dot_f32,
    from_e4m3,
    round_to_e4m3,
    to_bf16,
    to_e4m3,
    ue8m0,
    wait_for_inputs,
)

MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def scores_kernel(
    q_ptr, w_ptr, cache_ptr, table_ptr, position_ptr, score_ptr, count_ptr,
    num_slots, num_blocks, rows_per_sequence, first_row, last_row, pages, num_counts, TOPK,
    HEADS: tl.constexpr, ROWS: tl.constexpr,
    BYTES: tl.constexpr, QUANT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """q bf16 [B, Q, HEADS, 128], w f32 [B, Q, HEADS] -> score f32 [last_row - first_row, num_blocks · 64].

    Row r of the scores belongs to query row first_row + r; rows are counted over the batch. The first program of some
    rows also clears the counts i32 [last_row - first_row, num_counts] that the selection adds to.
    """
    wait_for_inputs()
    COLUMNS: tl.constexpr = ROWS * HEADS
    groups = tl.cdiv(rows_per_sequence, ROWS)
    group = tl.program_id(0) + first_row // rows_per_sequence * groups
    sequence = group // groups
    in_sequence = (group % groups) * ROWS + tl.arange(0, ROWS)
    row = (sequence * rows_per_sequence + in_sequence).to(tl.int64)
    row_ok = (in_sequence < rows_per_sequence) & (row >= first_row) & (row < last_row)
    position = tl.load(position_ptr + row, mask=row_ok, other=-1)
    length = tl.minimum(position + 1, num_blocks.to(tl.int64) * 64)
    if tl.program_id(1) == 0:
        for start in range(0, num_counts, 1024):
            count_at = (row - first_row)[:, None] * num_counts + start + tl.arange(0, 1024)[None, :]
            tl.store(count_ptr + count_at, tl.zeros([ROWS, 1024], tl.int32), mask=row_ok[:, None])
    # rows that take every key need no score
    longest = tl.max(tl.where(length > TOPK, length, 0), 0)
    first_page = tl.program_id(1) * pages
    if first_page * 64 < longest:
        lane = tl.arange(0, 128)
        column = tl.arange(0, COLUMNS)
        q_row = (sequence * rows_per_sequence + (group % groups) * ROWS).to(tl.int64)
        q_ok = (group % groups) * ROWS + column // HEADS < rows_per_sequence
        at = (q_row * HEADS + column)[:, None] * 128 + lane[None, :]
        q = tl.load(q_ptr + at, mask=q_ok[:, None], other=0.0).to(tl.float32)
        weight = tl.load(w_ptr + q_row * HEADS + column, mask=q_ok, other=0.0)
        if QUANT:
            scale, inverse = ue8m0(tl.max(tl.abs(q), 1))
            weight = weight * scale
            if BYTES and FP8:
                q8 = to_e4m3(q * inverse[:, None], FP8).to(tl.float8e4nv, bitcast=True)
            else:
                q8 = to_bf16(round_to_e4m3(tl.minimum(tl.maximum(q * inverse[:, None], -448.0), 448.0)))
        else:
            q8 = to_bf16(q)
        for page in range(first_page, tl.minimum(first_page + pages, tl.cdiv(longest, 64).to(tl.int32))):
            block = tl.load(table_ptr + sequence.to(tl.int64) * num_blocks + page).to(tl.int64)
            in_pool = (block >= 0) & (block < num_slots // 64)
            block = tl.where(in_pool, block, 0)
            key = tl.arange(0, 64)
            if BYTES:
                base = cache_ptr + block * (64 * 132)
                if FP8:
                    k8 = tl.load((base + key[:, None] * 128 + lane[None, :]).to(tl.pointer_type(tl.float8e4nv)))
                else:
                    k8 = tl.load(base + key[:, None] * 128 + lane[None, :])
                key_scale = tl.load((base + 64 * 128).to(tl.pointer_type(tl.float32)) + key)
                if FP8 and QUANT:
                    s = tl.dot(k8, tl.trans(q8))
                    if INTERPRET:  # it reads the NaN byte as 480; the GPU's product is NaN
                        wrong = tl.max(tl.where(tl.abs(k8.to(tl.float32)) > 448.0, 1, 0), 1)
                        s = tl.where(wrong[:, None] > 0, float("nan"), s)
                else:
                    s = dot_f32(to_bf16(from_e4m3(k8, FP8)), tl.trans(q8))
            else:
                k = tl.load(cache_ptr + (block * 64 + key)[:, None] * 128 + lane[None, :])
                s = dot_f32(k, tl.trans(q8))
            s = tl.where(s <= 0.0, 0.0, s) * weight[None, :]  # not a maximum: NaN must stay
            score = tl.sum(tl.reshape(s, [64, ROWS, HEADS]), 2)
            if BYTES:
                score = score * key_scale[:, None]
            score = tl.where(score != score, -MAX_FLOAT, tl.minimum(tl.maximum(score, -MAX_FLOAT), MAX_FLOAT))
            score = tl.where(in_pool, score, -MAX_FLOAT)
            where_to = (row - first_row)[None, :] * (num_blocks.to(tl.int64) * 64) + page * 64 + key[:, None]
            visible = row_ok[None, :] & (page * 64 + key[:, None] < length[None, :])
            tl.store(score_ptr + where_to, score, mask=visible)


@triton.jit
def _keys(score_ptr, at, length):
    """Read scores as u32 whose order is that of the floats; 0 beyond the length."""
    bits = (tl.load(score_ptr + at, mask=at < length, other=0.0) + 0.0).to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)  # -0 is +0
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(at < length, key, 0)


@triton.jit
def _pick(histogram, want, BINS: tl.constexpr):
    """Return (digit of the want-th largest, how many it still needs within that digit)."""
    bins = tl.arange(0, BINS)
    from_above = tl.cumsum(histogram, 0, reverse=True)
    digit = tl.sum((from_above >= want).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(bins > digit, histogram, 0), 0)
    return digit, want - above


@triton.jit
def _length(position_ptr, row, length_limit):
    """Return how many keys a query row sees."""
    return tl.maximum(tl.minimum(tl.load(position_ptr + row) + 1, length_limit.to(tl.int64)), 0).to(tl.int32)


@triton.jit
def _take_all(out, length, TOPK, BLOCK: tl.constexpr):
    """Write 0 … length - 1, then -1."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, TOPK, BLOCK):
        at = start + lane
        tl.store(out + at, tl.where(at < length, at, -1), mask=at < TOPK)


@triton.jit
def _emit(scores, out, first, last, threshold, want, larger, equals, BLOCK: tl.constexpr):
    """Write the positions in [first, last) whose key is above `threshold`, or among the first `want` that equal it.

    So many larger and equal keys lie before `first`. Both are counted in one number, of 16 bits each within a block.
    """
    lane = tl.arange(0, BLOCK)
    for start in range(first, last, BLOCK):
        at = start + lane
        key = _keys(scores, at, last)
        is_larger, is_equal = (key > threshold) & (at < last), (key == threshold) & (at < last)
        both = is_larger.to(tl.int32) + (is_equal.to(tl.int32) << 16)
        earlier = tl.cumsum(both, 0) - both
        rank = equals + (earlier >> 16)
        place = larger + (earlier & 0xFFFF) + tl.minimum(rank, want)
        tl.store(out + place, at, mask=is_larger | (is_equal & (rank < want)))
        total = tl.sum(both, 0)
        larger += total & 0xFFFF
        equals += total >> 16


@triton.jit
def select_kernel(score_ptr, position_ptr, out_ptr, length_limit, first_row, TOPK, BLOCK: tl.constexpr):
    """score f32 [rows, length_limit] -> out i32 [first_row + rows, TOPK]: ascending positions, then -1."""
    wait_for_inputs()
    BINS: tl.constexpr = 2048
    local = tl.program_id(0).to(tl.int64)
    length = _length(position_ptr, local + first_row, length_limit)
    out = out_ptr + (local + first_row) * TOPK
    lane = tl.arange(0, BLOCK)
    if length <= TOPK:
        _take_all(out, length, TOPK, BLOCK)
    else:
        scores = score_ptr + local * length_limit
        histogram = tl.zeros([BINS], tl.int32)
        for start in range(0, length, BLOCK):
            at = start + lane
            key = _keys(scores, at, length)
            histogram += tl.histogram((key >> 21).to(tl.int32), BINS, mask=at < length)
        high, want = _pick(histogram, TOPK, BINS)
        histogram = tl.zeros([BINS], tl.int32)
        for start in range(0, length, BLOCK):
            at = start + lane
            key = _keys(scores, at, length)
            mine = (at < length) & ((key >> 21).to(tl.int32) == high)
            histogram += tl.histogram(((key >> 10) & 0x7FF).to(tl.int32), BINS, mask=mine)
        middle, want = _pick(histogram, want, BINS)
        prefix = high * 2048 + middle
        histogram = tl.zeros([BINS], tl.int32)
        for start in range(0, length, BLOCK):
            at = start + lane
            key = _keys(scores, at, length)
            mine = (at < length) & ((key >> 10).to(tl.int32) == prefix)
            histogram += tl.histogram((key & 0x3FF).to(tl.int32), BINS, mask=mine)
        low, want = _pick(histogram, want, BINS)
        threshold = prefix.to(tl.uint32) * 1024 + low.to(tl.uint32)

        larger = 0
        equals = 0
        _emit(scores, out, 0, length, threshold, want, larger, equals, BLOCK)


@triton.jit
def digit_kernel(
    score_ptr, position_ptr, state_ptr, high_ptr, middle_ptr, low_ptr, above_ptr, length_limit, first_row, span, TOPK,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count a digit of the keys of `span` positions of a row: 12 high bits (level 0), the middle (1), 8 low ones (2).

    Levels 0 and 1 add to high and middle i32 [rows, 4096]; level 2 writes low i32 [rows, programs, 256] and how many
    keys have higher digits, above i32 [rows, programs]. Levels 1 and 2 count keys that share the digits of the TOPK-th
    largest, which the first program of a row leaves in state i32 [rows, 4]: (high, still wanted), then (both, wanted).
    """
    wait_for_inputs()
    BINS: tl.constexpr = 4096
    local = tl.program_id(0).to(tl.int64)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    length = _length(position_ptr, local + first_row, length_limit)
    if (length > TOPK) & (chunk * span < length):
        scores = score_ptr + local * length_limit
        high, middle, state = high_ptr + local * BINS, middle_ptr + local * BINS, state_ptr + local * 4
        bins, lane = tl.arange(0, BINS), tl.arange(0, BLOCK)
        last = tl.minimum(chunk * span + span, length)
        digit = 0
        want = TOPK
        if LEVEL == 0:
            if chunk == 0:
                tl.store(middle + bins, tl.zeros([BINS], tl.int32))
        elif LEVEL == 1:
            digit, want = _pick(tl.load(high + bins), TOPK, BINS)
            if chunk == 0:
                tl.store(state, digit)
                tl.store(state + 1, want)
        else:
            digit, want = _pick(tl.load(middle + bins), tl.load(state + 1), BINS)
            digit += tl.load(state) * BINS
            if chunk == 0:
                tl.store(state + 2, digit)
                tl.store(state + 3, want)
        counts = tl.zeros([256 if LEVEL == 2 else BINS], tl.int32)
        above = 0
        for start in range(chunk * span, last, BLOCK):
            at = start + lane
            key = _keys(scores, at, last)
            if LEVEL == 0:
                counts += tl.histogram((key >> 20).to(tl.int32), BINS, mask=at < last)
            elif LEVEL == 1:
                mine = (at < last) & ((key >> 20).to(tl.int32) == digit)
                counts += tl.histogram(((key >> 8) & 0xFFF).to(tl.int32), BINS, mask=mine)
            else:
                upper = (key >> 8).to(tl.int32)
                counts += tl.histogram((key & 0xFF).to(tl.int32), 256, mask=(at < last) & (upper == digit))
                above += tl.sum(((at < last) & (upper > digit)).to(tl.int32), 0)
        if LEVEL == 0:
            tl.atomic_add(high + bins, counts, mask=counts > 0, sem="relaxed")
        elif LEVEL == 1:
            tl.atomic_add(middle + bins, counts, mask=counts > 0, sem="relaxed")
        else:
            tl.store(low_ptr + (local * chunks + chunk) * 256 + tl.arange(0, 256), counts)
            tl.store(above_ptr + local * chunks + chunk, above)


@triton.jit
def emit_kernel(
    score_ptr, position_ptr, state_ptr, low_ptr, above_ptr, out_ptr, length_limit, first_row, span, TOPK,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write the part of out i32 [first_row + rows, TOPK] that comes of `span` positions of a row, after `digit_kernel`.

    A program adds up the counts of its row by itself, CHUNKS programs at a time.
    """
    wait_for_inputs()
    local = tl.program_id(0).to(tl.int64)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    length = _length(position_ptr, local + first_row, length_limit)
    out = out_ptr + (local + first_row) * TOPK
    if length <= TOPK:
        if chunk == 0:
            _take_all(out, length, TOPK, BLOCK)
    elif chunk * span < length:
        bins = tl.arange(0, 256)
        counts = tl.zeros([CHUNKS, 256], tl.int32)
        earlier = tl.zeros([CHUNKS, 256], tl.int32)
        larger = tl.zeros([CHUNKS], tl.int32)
        used = tl.cdiv(length, span)
        for start in range(0, used, CHUNKS):
            other = start + tl.arange(0, CHUNKS)
            at = local * chunks + other
            low = tl.load(low_ptr + at[:, None] * 256 + bins[None, :], mask=other[:, None] < used, other=0)
            counts += low
            earlier += tl.where(other[:, None] < chunk, low, 0)
            larger += tl.load(above_ptr + at, mask=other < chunk, other=0)
        digit, want = _pick(tl.sum(counts, 0), tl.load(state_ptr + local * 4 + 3), 256)
        threshold = tl.load(state_ptr + local * 4 + 2).to(tl.uint32) * 256 + digit.to(tl.uint32)
        before = tl.sum(earlier, 0)
        above = tl.sum(larger, 0) + tl.sum(tl.where(bins > digit, before, 0), 0)
        equals = tl.sum(tl.where(bins == digit, before, 0), 0)
        last = tl.minimum(chunk * span + span, length)
        _emit(score_ptr + local * length_limit, out, chunk * span, last, threshold, want, above, equals, BLOCK)
