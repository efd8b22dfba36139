"""`DsaIndexer` in standard ONNX operators: a Scan over the query rows, all sequences at once.

In ONNX Runtime a step whose block tables hold no more than `index_topk` keys skips it: all that is visible is picked.

The keys of the sequences are gathered once. They are the left operand of the product, which ONNX Runtime reads where
it lies; the right one is packed anew for every row. Memory per row is [B, L, Hi].
"""

import numpy as np
import onnx

from seekforge.plugins.dsa_indexer.spec import SPEC
from seekforge.plugins.errors import ProgramError
from seekforge.plugins.function_text import Attrs, Text, cast, fake_quantise, onnx_type
from seekforge.plugins.specialisation import Specialisation

_PAGE = 64
_NOWHERE = 2**30  # sorts behind every position
_MAX = np.finfo(np.float32).max


def body(attrs: Attrs, how: Specialisation) -> onnx.FunctionProto:
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
    text.add(f"""
  blocks = Cast<to = {onnx_type("i64")}>(block_table)
  firsts = Mul(blocks, {text.i64(_PAGE)})
  firsts3 = Unsqueeze(firsts, {text.ints(2)})
  slots3 = Add(firsts3, {text.table(np.arange(_PAGE, dtype=np.int64))})
  slots = Reshape(slots3, {text.ints(0, -1)})
  length1 = Shape<start = 1, end = 2>(slots)
  length = Squeeze(length1)
  logical = Range({text.i64(0)}, length, {text.i64(1)})
""")
    if how.bodies == "trt":
        # a K that changes with L inside a scan does not build, so every row is widened by index_topk columns
        # that nobody sees
        _add_scan(text, attrs, how, "picked", k=text.ints(topk))
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
    _add_scan(text, attrs, how, "chosen", k="k")
    text.add(f"""
    }}>
  columns1 = Shape<start = 2, end = 3>(picked)
  short = Sub({text.ints(topk)}, columns1)
  pads = Concat<axis = 0>({text.ints(0, 0, 0, 0, 0)}, short)
  padded = Pad(picked, pads, {text.i32(-1)})
  topk_indices = Reshape(padded, {text.ints(0, 0, topk)})
""")
    return text.body_of(SPEC)


def _add_scan(text: Text, attrs: Attrs, how: Specialisation, out: str, *, k: str) -> None:
    """Score the keys of every query row and write the ascending positions of the `k` best to `out`."""
    ort = how.bodies == "ort"
    q = "q"
    if attrs["indexer_fp8"]:
        q = fake_quantise(text, q, "q_", dtype=how.activations, bodies=how.bodies)
    text.add("stored = Gather<axis = 0>(index_cache, slots)")
    keys = cast(text, "stored", "keys", to="f32", given=str(attrs["index_format"]))
    text.add(f"""
  done, {out} = Scan<num_scan_inputs = 3, scan_input_axes = [1, 1, 1], scan_output_axes = [1], body = query_row
    (state, q_row, w_row, position) => (state_out, row) {{
      state_out = Identity(state)
""")
    q_row = cast(text, "q_row", "q_row_f", to="f32", given=how.activations)
    text.add(f"q_columns = Transpose<perm = [0, 2, 1]>({q_row})")
    text.add(f"dots = MatMul({keys}, q_columns)")
    if ort:
        text.add("open = Relu(dots)")  # keeps NaN in ONNX Runtime
    else:  # a GPU's max(NaN, 0) is 0
        text.add(f"negative = Less(dots, {text.f32(0)})")
        text.add(f"open = Where(negative, {text.f32(0)}, dots)")
    text.add(f"""
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
""")
    score = "narrow"
    if not ort:
        score = "widened"
        widening = text.ints(0, 0, 0, int(attrs["index_topk"]))
        text.add(f"widened = Pad(narrow, {widening}, {text.f32(-np.inf)})")
    text.add(f"""
      values, where = TopK<axis = -1, largest = 1, sorted = 1>({score}, {k})
      hidden = Less(values, {text.f32(-_MAX)})
      found = Where(hidden, {text.i64(_NOWHERE)}, where)
      ascending, unused = TopK<axis = -1, largest = 0, sorted = 1>(found, {k})
      nowhere = GreaterOrEqual(ascending, {text.i64(_NOWHERE)})
      marked = Where(nowhere, {text.i64(-1)}, ascending)
      row = Cast<to = {onnx_type("i32")}>(marked)
  }}>({text.f32(0)}, {q}, w, positions)
""")
