"""`DsaIndexer` in standard ONNX operators: a Scan over the query rows, all sequences at once.

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
    q = "q"
    if attrs["indexer_fp8"]:
        q = fake_quantise(text, q, "q_", dtype=how.activations, bodies=how.bodies)
    text.add(f"""
  blocks = Cast<to = {onnx_type("i64")}>(block_table)
  firsts = Mul(blocks, {text.i64(_PAGE)})
  firsts3 = Unsqueeze(firsts, {text.ints(2)})
  slots3 = Add(firsts3, {text.table(np.arange(_PAGE, dtype=np.int64))})
  slots = Reshape(slots3, {text.ints(0, -1)})
  stored = Gather<axis = 0>(index_cache, slots)
""")
    keys = cast(text, "stored", "keys", to="f32", given=cache_type)
    text.add(f"""
  length1 = Shape<start = 1, end = 2>(slots)
  length = Squeeze(length1)
  logical = Range({text.i64(0)}, length, {text.i64(1)})
""")
    # ort: as many columns as there are keys, padded after the scan. trt: a K that changes with L inside a scan
    # does not build, so every row is widened by index_topk columns that nobody sees.
    ort = how.bodies == "ort"
    k = "k" if ort else text.ints(topk)
    if ort:
        text.add(f"k = Min(length1, {text.ints(topk)})")
    text.add("""
  done, picked = Scan<num_scan_inputs = 3, scan_input_axes = [1, 1, 1], scan_output_axes = [1], body = query_row
    (state, q_row, w_row, position) => (state_out, row) {
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
        text.add(f"widened = Pad(narrow, {text.ints(0, 0, 0, topk)}, {text.f32(-np.inf)})")
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
    if ort:
        text.add(f"""
  short = Sub({text.ints(topk)}, k)
  pads = Concat<axis = 0>({text.ints(0, 0, 0, 0, 0)}, short)
  padded = Pad(picked, pads, {text.i32(-1)})
  topk_indices = Reshape(padded, {text.ints(0, 0, topk)})
""")
    else:
        text.add("topk_indices = Identity(picked)")
    return text.body_of(SPEC)
