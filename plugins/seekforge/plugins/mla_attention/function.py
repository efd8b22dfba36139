"""`MlaAttention` in standard ONNX operators: plain products with all cached rows of a sequence, and a causal mask.

A Scan over blocks of query rows for ONNX Runtime, over single rows for TensorRT. The cached rows serve as keys and,
uncut, as values: cutting the H × (C + R) result is cheaper than copying the rows.
"""

import numpy as np
import onnx

from seekforge.plugins.functions.builder import Attrs, Text, cast, join_blocks, paged_slots, query_blocks
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.mla_attention.spec import SPEC

#: Rows of a block: at most so many, and at most so many scores of one head and sequence.
_MOST_ROWS, _MOST_SCORES = 64, 1 << 18


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return scores, softmax in f32 and the weighted sum. Rows behind the last position never enter a product."""
    text = Text()
    paged_slots(text, "slot_of")
    text.add(f"""
  length1 = Shape<start = 1, end = 2>(slot_of)
  length = Squeeze(length1)
  at = Range({text.i64(0)}, length, {text.i64(1)})
  last = ReduceMax<keepdims = 1>(positions, {text.ints(1)})
  is_used = LessOrEqual(at, last)
  is_used3 = Unsqueeze(is_used, {text.ints(2)})
  stored = Gather<axis = 0>(latent_cache, slot_of)
""")
    stored = cast(text, "stored", "stored_f", to="f32", from_=str(attrs["kv_format"]))
    text.add(f"""
  keys = Where(is_used3, {stored}, {text.f32(0)})
  keys_t = Transpose<perm = [0, 2, 1]>(keys)
  heads_latent = Shape<start = 2, end = 4>(q_latent)
  latent_dim = Shape<start = 3, end = 4>(q_latent)
  width = Shape<start = 1, end = 2>(latent_cache)
  query = Concat<axis = -1>(q_latent, q_pe)
""")
    query = cast(text, "query", "query_f", to="f32", from_=how.activations)
    text.add(f"scaled = Mul({query}, {text.f32(float(attrs['scale']))})")
    if how.bodies == "ort":
        _add_blocks(text, how)
    else:
        _add_rows(text, how)
    return text.body_of(SPEC)


def _add_blocks(text: Text, how: Specialization) -> None:
    text.add(f"""
  at_least1 = Max(length1, {text.ints(1)})
  fitting = Div({text.ints(_MOST_SCORES)}, at_least1)
  some_rows = Max(fitting, {text.ints(1)})
  most_rows = Min(some_rows, {text.ints(_MOST_ROWS)})
  positions3 = Unsqueeze(positions, {text.ints(2)})
""")
    query_blocks(text, "most_rows", {"scaled": text.f32(0), "positions3": text.i64(-1)})
    text.add(f"""
  flat_shape = Concat<axis = 0>({text.ints(0, -1)}, width)
  score_shape = Concat<axis = 0>({text.ints(0)}, rows1, {text.ints(-1)}, length1)
  wide_shape = Concat<axis = 0>({text.ints(0)}, rows1, {text.ints(-1)}, width)
  done, result_blocks = Scan<num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1], body = query_block
    (state, q_block, position) => (state_out, out) {{
      state_out = Identity(state)
      q_rows = Reshape(q_block, flat_shape)
      score = MatMul(q_rows, keys_t)
      score4 = Reshape(score, score_shape)
      visible = LessOrEqual(at, position)
      visible4 = Unsqueeze(visible, {text.ints(2)})
      masked = Where(visible4, score4, {text.f32(-np.inf)})
      weight4 = Softmax<axis = -1>(masked)
      weight_shape = Shape(score)
      weight = Reshape(weight4, weight_shape)
      summed = MatMul(weight, keys)
      wide = Reshape(summed, wide_shape)
      narrow = Slice(wide, {text.ints(0)}, latent_dim, {text.ints(3)})
      is_real = GreaterOrEqual(position, {text.i64(0)})
      is_real4 = Unsqueeze(is_real, {text.ints(3)})
      result = Where(is_real4, narrow, {text.f32(0)})
""")
    out = cast(text, "result", "result_cast", to=how.activations, from_="f32")
    text.add(f"out = Identity({out})\n  }}>({text.f32(0)}, scaled_blocks, positions3_blocks)")
    join_blocks(text, "result_blocks", "heads_latent", "o_latent")


def _add_rows(text: Text, how: Specialization) -> None:
    text.add(f"""
  done, o_latent = Scan<num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1], body = query_row
    (state, q_row, position) => (state_out, out) {{
      state_out = Identity(state)
      score = MatMul(q_row, keys_t)
      position2 = Unsqueeze(position, {text.ints(1)})
      visible = LessOrEqual(at, position2)
      visible3 = Unsqueeze(visible, {text.ints(1)})
      masked = Where(visible3, score, {text.f32(-np.inf)})
      weight = Softmax<axis = -1>(masked)
      wide = MatMul(weight, keys)
      narrow = Slice(wide, {text.ints(0)}, latent_dim, {text.ints(2)})
      is_real = GreaterOrEqual(position2, {text.i64(0)})
      is_real3 = Unsqueeze(is_real, {text.ints(2)})
      result = Where(is_real3, narrow, {text.f32(0)})
""")
    out = cast(text, "result", "result_cast", to=how.activations, from_="f32")
    text.add(f"out = Identity({out})\n  }}>({text.f32(0)}, scaled, positions)")
