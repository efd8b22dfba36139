"""`DsaAttention` in standard ONNX operators.

`trt`: a Scan over the query rows, each gathers its own chosen keys.

`ort`: a Scan over blocks of query rows. Where the block is large and its chosen keys are not far into the context, the
first columns are taken as a whole and masked: plain products, which are worth it up to some four times `index_topk`
columns. Elsewhere each row gathers its own keys. The two sum in other orders; so a step whose rows come twice, as in
the runtime's deterministic mode, takes the second form always, in which a row has the same bits in any company.

The gathered rows serve as keys and, uncut, as values: cutting the H × (C + R) result is cheaper than copying
TOPK × C values.
"""

import numpy as np
import onnx

from seekforge.common.errors import ProgramError
from seekforge.plugins.dsa_attention.spec import SPEC
from seekforge.plugins.functions.builder import Attrs, Text, cast, join_blocks, onnx_type, paged_slots, query_blocks
from seekforge.plugins.functions.specialization import Specialization

#: Rows of a block: at most so many, and at most so many gathered keys per sequence.
_MOST_ROWS, _MOST_KEYS = 64, 8192
#: The masked form: from so many rows on, and up to so many columns per chosen key. Measured at 16 heads of 320.
_ROWS_FOR_ALL, _COLUMNS_PER_KEY = 8, 4


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return gather, scores, softmax in f32 and the weighted sum.

    A column without a key repeats one that was chosen, and is masked: rubbish in unused slots never enters a product.

    Raises:
        ProgramError: the cache has the byte layout fp8_ds, which only the plugin reads.
    """
    if attrs["kv_format"] == "fp8_ds":
        raise ProgramError(
            "DsaAttention: kv_format fp8_ds has no decomposition; build with plugins, or with kv_format f32 or bf16"
        )
    text = Text()
    paged_slots(text, "slot_of")
    text.add(f"""
  length = Shape<start = 1, end = 2>(slot_of)
  topk = Shape<start = 2, end = 3>(topk_indices)
  k = Min(length, topk)
  columns = Slice(topk_indices, {text.ints(0)}, k, {text.ints(2)})
""")
    if how.bodies == "ort":
        _add_blocks(text, attrs, how)
    else:
        _add_rows(text, attrs, how)
    return text.body_of(SPEC)


def _add_blocks(text: Text, attrs: Attrs, how: Specialization) -> None:
    text.add("query = Concat<axis = -1>(q_latent, q_pe)")
    query = cast(text, "query", "query_f", to="f32", from_=how.activations)
    text.add(f"""
  heads_latent = Shape<start = 2, end = 4>(q_latent)
  latent_dim = Shape<start = 3, end = 4>(q_latent)
  width = Shape<start = 1, end = 2>(latent_cache)
  scaled = Mul({query}, {text.f32(float(attrs["scale"]))})
  count1 = Shape<start = 1, end = 2>(q_latent)
  is_one1 = Equal(count1, {text.ints(1)})
  is_one = Squeeze(is_one1)
  o_latent = If (is_one) <
    then_branch = one_row () => (o_one) {{
      one_q4 = Slice(scaled, {text.ints(0)}, {text.ints(1)}, {text.ints(1)})
      one_chosen = Slice(columns, {text.ints(0)}, {text.ints(1)}, {text.ints(1)})
""")
    # a graph whose steps are known to have more rows must type too, hence the slices
    _add_own(text, attrs, "one_", "one_q4", "one_chosen", text.ints(1))
    _add_result(text, how, "one_wide", "one_chosen", "one_", "o_one")
    text.add(f"""
    }}, else_branch = many_rows () => (o_many) {{
  fitting = Div({text.ints(_MOST_KEYS)}, k)
  some_rows = Max(fitting, {text.ints(1)})
  most_rows = Min(some_rows, {text.ints(_MOST_ROWS)})
""")
    query_blocks(text, "most_rows", {"scaled": text.f32(0), "columns": text.i32(-1)})
    text.add(f"""
  half = Div(query_count1, {text.ints(2)})
  half_next = Add(half, {text.ints(1)})
  row_at_0 = Slice(columns, {text.ints(0)}, {text.ints(1)}, {text.ints(1)})
  row_at_half = Slice(columns, half, half_next, {text.ints(1)})
  apart_by = Sub(row_at_0, row_at_half)
  magnitude = Abs(apart_by)
  largest = ReduceMax<keepdims = 0>(magnitude)
  come_once = Greater(largest, {text.i32(0)})
  enough1 = GreaterOrEqual(rows1, {text.ints(_ROWS_FOR_ALL)})
  enough = Squeeze(enough1)
  may_share = And(come_once, enough)
  worth1 = Mul(k, {text.ints(_COLUMNS_PER_KEY)})
  worth64 = Squeeze(worth1)
  worth = Cast<to = {onnx_type("i32")}>(worth64)
  shared_shape = Concat<axis = 0>({text.ints(0, -1)}, width)
  wide_shape = Concat<axis = 0>({text.ints(0)}, rows1, {text.ints(-1)}, width)
  done, result_blocks = Scan<num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1], body = query_block
    (state, q_block, chosen) => (state_out, out) {{
      state_out = Identity(state)
      last = ReduceMax<keepdims = 0>(chosen, {text.ints(1, 2)})
      farthest = ReduceMax<keepdims = 0>(last)
      is_near = Less(farthest, worth)
      is_shared = And(is_near, may_share)
      wide = If (is_shared) <
        then_branch = together () => (shared_wide) {{
""")
    _add_shared(text, attrs)
    text.add("        }, else_branch = apart () => (own_wide) {")
    _add_own(text, attrs, "own_", "q_block", "chosen", "rows1")
    text.add("        }>")
    _add_result(text, how, "wide", "chosen", "block_", "out")
    text.add(f"  }}>({text.f32(0)}, scaled_blocks, columns_blocks)")
    join_blocks(text, "result_blocks", "heads_latent", "o_many")
    text.add("}>")


def _add_result(text: Text, how: Specialization, wide: str, chosen: str, p: str, out: str) -> None:
    """Write `out`: `wide` cut to the latent values, zero in rows without a key, in the activation dtype."""
    text.add(f"""
      {p}narrow = Slice({wide}, {text.ints(0)}, latent_dim, {text.ints(3)})
      {p}key = Slice({chosen}, {text.ints(0)}, {text.ints(1)}, {text.ints(2)})
      {p}some = GreaterOrEqual({p}key, {text.i32(0)})
      {p}some4 = Unsqueeze({p}some, {text.ints(3)})
      {p}result = Where({p}some4, {p}narrow, {text.f32(0)})
""")
    result = cast(text, f"{p}result", f"{p}cast", to=how.activations, from_="f32")
    text.add(f"{out} = Identity({result})")


def _add_shared(text: Text, attrs: Attrs) -> None:
    """Write `shared_wide`: products with all first columns, up to the farthest chosen one, masked."""
    text.add(f"""
          ends = Add(farthest, {text.i32(1)})
          some_ends = Max(ends, {text.i32(1)})
          n32 = Unsqueeze(some_ends, {text.ints(0)})
          n = Cast<to = {onnx_type("i64")}>(n32)
          nowhere = Cast<to = {onnx_type("i64")}>(some_ends)
          chosen64 = Cast<to = {onnx_type("i64")}>(chosen)
          is_key = GreaterOrEqual(chosen64, {text.i64(0)})
          marked_at = Where(is_key, chosen64, nowhere)
          rows_shape = Shape<start = 0, end = 2>(chosen)
          n_more = Add(n, {text.ints(1)})
          marks_shape = Concat<axis = 0>(rows_shape, n_more)
          chosen_shape = Shape(chosen)
          marks_0 = Expand({text.f32(0)}, marks_shape)
          ones = Expand({text.f32(1)}, chosen_shape)
          marks = ScatterElements<axis = 2>(marks_0, marked_at, ones)
          mark = Slice(marks, {text.ints(0)}, n, {text.ints(2)})
          is_chosen = Cast<to = {onnx_type("bool")}>(mark)
          is_chosen4 = Unsqueeze(is_chosen, {text.ints(2)})
          marked_any = ReduceMax<keepdims = 0>(mark, {text.ints(1)})
          is_used = Cast<to = {onnx_type("bool")}>(marked_any)
          last0 = Max(last, {text.i32(0)})
          last64 = Cast<to = {onnx_type("i64")}>(last0)
          last2 = Unsqueeze(last64, {text.ints(1)})
          last_slot = GatherElements<axis = 1>(slot_of, last2)
          first_slots = Slice(slot_of, {text.ints(0)}, n, {text.ints(1)})
          slots = Where(is_used, first_slots, last_slot)
          stored = Gather<axis = 0>(latent_cache, slots)
""")
    shared = cast(text, "stored", "shared", to="f32", from_=str(attrs["kv_format"]))
    text.add(f"""
          q_rows = Reshape(q_block, shared_shape)
          shared_t = Transpose<perm = [0, 2, 1]>({shared})
          score = MatMul(q_rows, shared_t)
          score_shape = Concat<axis = 0>({text.ints(0)}, rows1, {text.ints(-1)}, n)
          score4 = Reshape(score, score_shape)
          masked = Where(is_chosen4, score4, {text.f32(-np.inf)})
          weight4 = Softmax<axis = -1>(masked)
          weight_shape = Shape(score)
          weight = Reshape(weight4, weight_shape)
          summed = MatMul(weight, {shared})
          shared_wide = Reshape(summed, wide_shape)
""")


def _add_own(text: Text, attrs: Attrs, p: str, q: str, chosen: str, rows: str) -> None:
    """Write `{p}wide`: every row with its own keys. These are the left operand of the scores, read where they lie."""
    text.add(f"""
          {p}shape = Concat<axis = 0>({text.ints(0)}, {rows}, k, width)
          {p}q_shape = Concat<axis = 0>({text.ints(0)}, {rows}, {text.ints(-1)}, width)
          {p}valid = GreaterOrEqual({chosen}, {text.i32(0)})
          {p}first = Slice({chosen}, {text.ints(0)}, {text.ints(1)}, {text.ints(2)})
          {p}filled = Where({p}valid, {chosen}, {p}first)
          {p}safe = Max({p}filled, {text.i32(0)})
          {p}safe64 = Cast<to = {onnx_type("i64")}>({p}safe)
          {p}flat = Reshape({p}safe64, {text.ints(0, -1)})
          {p}slots = GatherElements<axis = 1>(slot_of, {p}flat)
          {p}stored = Gather<axis = 0>(latent_cache, {p}slots)
""")
    rows = cast(text, f"{p}stored", f"{p}rows", to="f32", from_=str(attrs["kv_format"]))
    text.add(f"""
          {p}keys = Reshape({rows}, {p}shape)
          {p}q = Reshape({q}, {p}q_shape)
          {p}q_t = Transpose<perm = [0, 1, 3, 2]>({p}q)
          {p}score_t = MatMul({p}keys, {p}q_t)
          {p}score = Transpose<perm = [0, 1, 3, 2]>({p}score_t)
          {p}valid4 = Unsqueeze({p}valid, {text.ints(2)})
          {p}masked = Where({p}valid4, {p}score, {text.f32(-np.inf)})
          {p}weight = Softmax<axis = -1>({p}masked)
          {p}wide = MatMul({p}weight, {p}keys)
""")


def _add_rows(text: Text, attrs: Attrs, how: Specialization) -> None:
    cache_type = str(attrs["kv_format"])
    text.add(f"""
  latent_dim = Shape<start = 3, end = 4>(q_latent)
  done, o_latent = Scan<num_scan_inputs = 3, scan_input_axes = [1, 1, 1], scan_output_axes = [1], body = query_row
    (state, latent_row, pe_row, chosen) => (state_out, out) {{
      state_out = Identity(state)
      valid = GreaterOrEqual(chosen, {text.i32(0)})
      first = Slice(chosen, {text.ints(0)}, {text.ints(1)}, {text.ints(1)})
      some = GreaterOrEqual(first, {text.i32(0)})
      filled = Where(valid, chosen, first)
      safe32 = Max(filled, {text.i32(0)})
      safe = Cast<to = {onnx_type("i64")}>(safe32)
      slots = GatherElements<axis = 1>(slot_of, safe)
      stored = Gather<axis = 0>(latent_cache, slots)
""")
    rows = cast(text, "stored", "rows", to="f32", from_=cache_type)
    text.add("query = Concat<axis = -1>(latent_row, pe_row)")
    query = cast(text, "query", "query_f", to="f32", from_=how.activations)
    text.add(f"""
      scaled = Mul({query}, {text.f32(float(attrs["scale"]))})
      rows_t = Transpose<perm = [0, 2, 1]>({rows})
      score = MatMul(scaled, rows_t)
      valid3 = Unsqueeze(valid, {text.ints(1)})
      masked = Where(valid3, score, {text.f32(-np.inf)})
      weight = Softmax<axis = -1>(masked)
      wide = MatMul(weight, {rows})
      narrow = Slice(wide, {text.ints(0)}, latent_dim, {text.ints(2)})
      some3 = Unsqueeze(some, {text.ints(1)})
      result = Where(some3, narrow, {text.f32(0)})
""")
    out = cast(text, "result", "result_cast", to=how.activations, from_="f32")
    text.add(f"      out = Identity({out})\n  }}>({text.f32(0)}, q_latent, q_pe, columns)")
