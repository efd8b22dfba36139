"""Lightning indexer: scores of every visible key, then the exact index_topk best of each row (spec §3.6, §3.7).

`scores_kernel`: one program takes ROWS query rows of one sequence (they share its keys) and a run of pages; queries are
`scores_kernel`: one program takes ROWS query rows of one sequence (they share keys) and a run of pages; queries are
`select_kernel`: one program per row. Scores become integers of the same order; three digits of 11, 11 and 10 bits
(histogram, count from above, pick) give the k-th largest exactly, and one ordered pass writes what is above it
and the first of what equals it: ascending, ties to the lowest position, no sort, no float atomics. Rows that see at
most index_topk keys take them all and read no score, so one CUDA graph serves all lengths.
Scores of keys that a row does not see are never written and never read.
"""

import triton
import triton.language as tl

from seekforge.plugins.kernels.device_lib import INTERPRET, dot_bf16, from_e4m3, round_to_e4m3, to_bf16, to_e4m3, ue8m0

MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def scores_kernel(
    q_ptr, w_ptr, cache_ptr, table_ptr, position_ptr, score_ptr,
    num_slots, num_blocks, rows_per_sequence, first_row, last_row, pages, TOPK,
    HEADS: tl.constexpr, ROWS: tl.constexpr,
    BYTES: tl.constexpr, QUANT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """q bf16 [B, Q, HEADS, 128], w f32 [B, Q, HEADS] -> score f32 [last_row - first_row, num_blocks · 64].

    Row r of the scores belongs to query row first_row + r; rows are counted over the batch.
    """
    COLUMNS: tl.constexpr = ROWS * HEADS
    groups = tl.cdiv(rows_per_sequence, ROWS)
    group = tl.program_id(0) + first_row // rows_per_sequence * groups
    sequence = group // groups
    in_sequence = (group % groups) * ROWS + tl.arange(0, ROWS)
    row = (sequence * rows_per_sequence + in_sequence).to(tl.int64)
    row_ok = (in_sequence < rows_per_sequence) & (row >= first_row) & (row < last_row)
    position = tl.load(position_ptr + row, mask=row_ok, other=-1)
    length = tl.minimum(position + 1, num_blocks.to(tl.int64) * 64)
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
                    s = dot_bf16(to_bf16(from_e4m3(k8, FP8)), tl.trans(q8))
            else:
                k = tl.load(cache_ptr + (block * 64 + key)[:, None] * 128 + lane[None, :])
                s = dot_bf16(k, tl.trans(q8))
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
def select_kernel(score_ptr, position_ptr, out_ptr, length_limit, first_row, TOPK, BLOCK: tl.constexpr):
    """score f32 [rows, length_limit] -> out i32 [first_row + rows, TOPK]: ascending positions, then -1."""
    BINS: tl.constexpr = 2048
    local = tl.program_id(0).to(tl.int64)
    row = local + first_row
    position = tl.load(position_ptr + row)
    length = tl.maximum(tl.minimum(position + 1, length_limit.to(tl.int64)), 0).to(tl.int32)
    out = out_ptr + row * TOPK
    lane = tl.arange(0, BLOCK)
    if length <= TOPK:
        for start in range(0, TOPK, BLOCK):
            at = start + lane
            tl.store(out + at, tl.where(at < length, at, -1), mask=at < TOPK)
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

        written = 0
        equals = 0
        for start in range(0, length, BLOCK):
            at = start + lane
            key = _keys(scores, at, length)
            equal = ((key == threshold) & (at < length)).to(tl.int32)
            rank = equals + tl.cumsum(equal, 0) - equal
            take = (((key > threshold) & (at < length)) | ((equal > 0) & (rank < want))).to(tl.int32)
            place = written + tl.cumsum(take, 0) - take
            tl.store(out + place, at, mask=take > 0)
            written += tl.sum(take, 0)
            equals += tl.sum(equal, 0)
