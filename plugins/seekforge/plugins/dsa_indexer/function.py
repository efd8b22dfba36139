"""`DsaIndexer` in standard ONNX operators, all sequences at once.

`trt`: a Scan over the query rows. The keys of the sequences are gathered once; memory per row is [B, L, Hi].

`ort`: a Scan over blocks of query rows, as many as fit a budget of scores. A step whose block tables hold no more than
`index_topk` keys skips it, and a block of rows that see no more than these reads no key: all that is visible is picked.
"""

import numpy as np
import onnx

from seekforge.common.errors import ProgramError
from seekforge.plugins.dsa_indexer.spec import SPEC
from seekforge.plugins.functions.builder import (
    Attrs,
    Text,
    cast,
    fake_quantize,
    join_blocks,
    onnx_type,
    paged_slots,
    query_blocks,
)
from seekforge.plugins.functions.specialization import Specialization

_NOWHERE = 2**30  # sorts behind every position
_MAX = np.finfo(np.float32).max
#: Rows of a block: at most so many, and at most so many scores per sequence and head.
_MOST_ROWS, _MOST_SCORES = 64, 65536


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return scores, the top-k of the visible ones, and their positions in ascending order.

    `TopK` gives equal scores to the lowest position in ONNX Runtime; TensorRT promises no order among them.

    Raises:
        ProgramError: the cache has the byte layout fp8_ds, which only the plugin reads.
    """
    cache_type = str(attrs["index_format"])
    if cache_type == "fp8_ds":
        raise ProgramError(
            "DsaIndexer: index_format fp8_ds has no decomposition; build with plugins, or with kv_format f32 or bf16"
        )
    topk = int(attrs["index_topk"])
    text = Text()
    paged_slots(text, "slots")
    text.add(f"""
  length1 = Shape<start = 1, end = 2>(slots)
  length = Squeeze(length1)
  logical = Range({text.i64(0)}, length, {text.i64(1)})
""")
    if how.bodies == "trt":
        _add_rows(text, attrs, how)
        text.add("topk_indices = Identity(picked)")
        return text.body_of(SPEC)
    # While no sequence can hold more than index_topk keys, every visible key is picked and no score is needed:
    # the keys are not even gathered. Otherwise as many columns as there are keys; both are padded at the end.
    text.add(f"""
  is_short1 = LessOrEqual(length1, {text.ints(topk)})
  is_short = Squeeze(is_short1)
  picked = If (is_short) <
    then_branch = everything () => (seen) {{
      positions3 = Unsqueeze(positions, {text.ints(2)})
      is_seen = LessOrEqual(logical, positions3)
      seen64 = Where(is_seen, logical, {text.i64(-1)})
      seen = Cast<to = {onnx_type("i32")}>(seen64)
    }},
    else_branch = best () => (chosen) {{
""")
    text.add(f"k = Min(length1, {text.ints(topk)})")  # of a table known to be short, the dead branch must type too
    _add_blocks(text, attrs, how)
    text.add(f"""
    }}>
  columns1 = Shape<start = 2, end = 3>(picked)
  short = Sub({text.ints(topk)}, columns1)
  pads = Concat<axis = 0>({text.ints(0, 0, 0, 0, 0)}, short)
  padded = Pad(picked, pads, {text.i32(-1)})
  topk_indices = Reshape(padded, {text.ints(0, 0, topk)})
""")
    return text.body_of(SPEC)


def _add_blocks(text: Text, attrs: Attrs, how: Specialization) -> None:
    """Write `chosen`: ascending positions of the `k` best keys of every row, `k` at most as many as there are keys.

    A row alone multiplies the keys where they lie; a block of rows packs them once. Every row chooses `k` places. Those
    that it does not see are later than all that it sees, so they come last in ascending order, and become −1.
    """
    q = "q"
    if attrs["indexer_fp8"]:
        q = fake_quantize(text, q, "q_", dtype=how.activations, bodies=how.bodies)
    q = cast(text, q, "q_wide", to="f32", from_=how.activations)
    text.add("stored = Gather<axis = 0>(index_cache, slots)")
    keys = cast(text, "stored", "keys", to="f32", from_=str(attrs["index_format"]))
    text.add(f"""
      dim = Shape<start = 2, end = 3>({keys})
      fitting = Div({text.ints(_MOST_SCORES)}, length1)
      some_rows = Max(fitting, {text.ints(1)})
      most_rows = Min(some_rows, {text.ints(_MOST_ROWS)})
""")
    query_blocks(text, "most_rows", {q: text.f32(0), "w": text.f32(0), "positions": text.i64(-1)})
    text.add(f"""
      alone1 = Equal(rows1, {text.ints(1)})
      alone = Squeeze(alone1)
      q_rows_shape = Concat<axis = 0>({text.ints(0, -1)}, dim)
      dots_shape = Concat<axis = 0>({text.ints(0)}, rows1, {text.ints(-1)}, length1)
      k_scalar = Squeeze(k)
      column = Range({text.i64(0)}, k_scalar, {text.i64(1)})
      done, chosen_blocks = Scan<num_scan_inputs = 3, scan_input_axes = [1, 1, 1], scan_output_axes = [1],
        body = query_block (state, q_block, w_block, position3) => (state_out, block) {{
          state_out = Identity(state)
          farthest = ReduceMax<keepdims = 0>(position3)
          sees_few = Less(farthest, k_scalar)
          ascending = If (sees_few) <
            then_branch = all_visible () => (all_columns) {{
              row_shape = Shape<start = 0, end = 2>(position3)
              all_shape = Concat<axis = 0>(row_shape, k)
              all_columns = Expand(column, all_shape)
            }},
            else_branch = best_visible () => (best_columns) {{
              q_rows = Reshape(q_block, q_rows_shape)
              summed = If (alone) <
                then_branch = one_row () => (summed_one) {{
                  q_columns = Transpose<perm = [0, 2, 1]>(q_rows)
                  dots_one = MatMul({keys}, q_columns)
                  open_one = Relu(dots_one)
                  w_column = Transpose<perm = [0, 2, 1]>(w_block)
                  summed_column = MatMul(open_one, w_column)
                  summed_one = Transpose<perm = [0, 2, 1]>(summed_column)
                }},
                else_branch = rows () => (summed_rows) {{
                  keys_t = Transpose<perm = [0, 2, 1]>({keys})
                  dots = MatMul(q_rows, keys_t)
                  open = Relu(dots)
                  open4 = Reshape(open, dots_shape)
                  w_rows = Unsqueeze(w_block, {text.ints(2)})
                  summed4 = MatMul(w_rows, open4)
                  summed_rows = Squeeze(summed4, {text.ints(2)})
                }}>
              rubbish = IsNaN(summed)
              numbers = Where(rubbish, {text.f32(-_MAX)}, summed)
              finite = Clip(numbers, {text.f32(-_MAX)}, {text.f32(_MAX)})
              is_visible = LessOrEqual(logical, position3)
              score = Where(is_visible, finite, {text.f32(-np.inf)})
              values, where = TopK<axis = -1, largest = 1, sorted = 0>(score, k)
              best_columns, unused = TopK<axis = -1, largest = 0, sorted = 1>(where, k)
            }}>
          is_seen3 = LessOrEqual(ascending, position3)
          marked = Where(is_seen3, ascending, {text.i64(-1)})
          block = Cast<to = {onnx_type("i32")}>(marked)
      }}>({text.f32(0)}, {q}_blocks, w_blocks, positions_blocks)
""")
    join_blocks(text, "chosen_blocks", "k", "chosen")


def _add_rows(text: Text, attrs: Attrs, how: Specialization) -> None:
    """Write `picked`: ascending positions of the `index_topk` best keys of every row.

    A K that changes with L inside a scan does not build, so every row is widened by `index_topk` columns that nobody
    sees.
    """
    topk = int(attrs["index_topk"])
    q = "q"
    if attrs["indexer_fp8"]:
        q = fake_quantize(text, q, "q_", dtype=how.activations, bodies=how.bodies)
    text.add("stored = Gather<axis = 0>(index_cache, slots)")
    keys = cast(text, "stored", "keys", to="f32", from_=str(attrs["index_format"]))
    text.add("""
  done, picked = Scan<num_scan_inputs = 3, scan_input_axes = [1, 1, 1], scan_output_axes = [1], body = query_row
    (state, q_row, w_row, position) => (state_out, row) {
      state_out = Identity(state)
""")
    q_row = cast(text, "q_row", "q_row_f", to="f32", from_=how.activations)
    text.add(f"""
      q_columns = Transpose<perm = [0, 2, 1]>({q_row})
      dots = MatMul({keys}, q_columns)
      negative = Less(dots, {text.f32(0)})
      open = Where(negative, {text.f32(0)}, dots)
      w_column = Unsqueeze(w_row, {text.ints(2)})
      summed3 = MatMul(open, w_column)
      summed = Squeeze(summed3, {text.ints(2)})
      rubbish = IsNaN(summed)
      numbers = Where(rubbish, {text.f32(-_MAX)}, summed)
      capped = Min(numbers, {text.f32(_MAX)})
      finite = Max(capped, {text.f32(-_MAX)})
      position2 = Unsqueeze(position, {text.ints(1)})
      visible = LessOrEqual(logical, position2)
      narrow = Where(visible, finite, {text.f32(-np.inf)})
      widened = Pad(narrow, {text.ints(0, 0, 0, topk)}, {text.f32(-np.inf)})
      values, where = TopK<axis = -1, largest = 1, sorted = 1>(widened, {text.ints(topk)})
      hidden = Less(values, {text.f32(-_MAX)})
      found = Where(hidden, {text.i64(_NOWHERE)}, where)
      ascending, unused = TopK<axis = -1, largest = 0, sorted = 1>(found, {text.ints(topk)})
      nowhere = GreaterOrEqual(ascending, {text.i64(_NOWHERE)})
      marked = Where(nowhere, {text.i64(-1)}, ascending)
      row = Cast<to = {onnx_type("i32")}>(marked)
  }}>({text.f32(0)}, {q}, w, positions)
""")
