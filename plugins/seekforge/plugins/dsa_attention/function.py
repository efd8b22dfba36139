"""`DsaAttention` in standard ONNX operators: a Scan over the query rows, each gathers its own chosen keys.

Work is the operator's; memory is one row of every sequence, [B, TOPK, C + R]. The gathered rows serve as keys and,
uncut, as values: cutting the H × (C + R) result is cheaper than copying TOPK × C values.
"""

import numpy as np
import onnx

from seekforge.plugins.dsa_attention.spec import SPEC
from seekforge.plugins.errors import ProgramError
from seekforge.plugins.function_text import Attrs, Text, cast, onnx_type
from seekforge.plugins.specialisation import Specialisation

_PAGE = 64


def body(attrs: Attrs, how: Specialisation) -> onnx.FunctionProto:
    """Return gather, scores, softmax in f32 and the weighted sum.

    A column without a key repeats the row's first one and is masked: its values are finite wherever the row's
    own keys are, so rubbish in unused slots never enters a product.

    Raises:
        ProgramError: the cache has the byte layout fp8_ds, which only the plugin reads.
    """
    cache_type = str(attrs["kv_format"])
    if cache_type == "fp8_ds":
        raise ProgramError(
            "DsaAttention: kv_format fp8_ds has no decomposition; build with plugins, or with kv_format f32 or bf16"
        )
    text = Text()
    text.add(f"""
  blocks = Cast<to = {onnx_type("i64")}>(block_table)
  firsts = Mul(blocks, {text.i64(_PAGE)})
  firsts3 = Unsqueeze(firsts, {text.ints(2)})
  slots3 = Add(firsts3, {text.table(np.arange(_PAGE, dtype=np.int64))})
  slot_of = Reshape(slots3, {text.ints(0, -1)})
  length = Shape<start = 1, end = 2>(slot_of)
  topk = Shape<start = 2, end = 3>(topk_indices)
  k = Min(length, topk)
  columns = Slice(topk_indices, {text.ints(0)}, k, {text.ints(2)})
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
    rows = cast(text, "stored", "rows", to="f32", given=cache_type)
    text.add("query = Concat<axis = -1>(latent_row, pe_row)")
    query = cast(text, "query", "query_f", to="f32", given=how.activations)
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
    out = cast(text, "result", "result_cast", to=how.activations, given="f32")
    text.add(f"      out = Identity({out})\n  }}>({text.f32(0)}, q_latent, q_pe, columns)")
    return text.body_of(SPEC)
