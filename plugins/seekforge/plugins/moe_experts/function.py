"""`MoeExperts` in standard ONNX operators.

`ort`: a Scan over the experts, whose weights are then slices and not copies; an expert works on its own rows only.
`trt`: TensorRT takes neither NonZero nor float8 in a loop, so bytes are decoded by a table and an expert that has
any token works on all of them; the rows that are not its own are dropped.
"""

import numpy as np
import onnx

from seekforge.common.errors import ProgramError
from seekforge.plugins.functions.builder import (
    Attrs,
    Text,
    cast,
    dequantize_weight,
    fake_quantize,
    matmul_transposed,
    onnx_type,
    swiglu,
)
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.moe_experts.spec import FOLDED, SPEC


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return the sum over experts.

    Raises:
        ProgramError: float8 weights with `trt` bodies.
    """
    if how.bodies == "trt" and how.fp8_storage == "float8":
        raise ProgramError(
            "MoeExperts: TensorRT takes no float8 weights in a loop; use fp8_storage=int8, or build with the plugin"
        )
    text = Text()
    x = "x"
    if attrs["act_quant"] == "ue8m0":
        x = fake_quantize(text, x, "q_", dtype=how.activations, bodies=how.bodies)
    _start(text, "w13")
    if how.bodies == "ort":
        _exact_work(text, attrs, how, x)
    else:
        _all_rows(text, attrs, how, x)
    return text.body_of(SPEC)


def folded_body(attrs: Attrs) -> onnx.FunctionProto:
    """Return `FoldedExperts(x, expert_ids, expert_weights, w13, w2)`, all f32.

    w13 [E, H, 2I] and w2 [E, I, H] are dequantized and transposed at build time; products read the Scan's slices.
    """
    text = Text()
    x = "x"
    if attrs["act_quant"] == "ue8m0":
        x = fake_quantize(text, x, "q_", dtype="f32", bodies="ort")
    _start(text, "w13")
    _open_scan(text, "w13_e, w2_e", 2)
    _own_rows(text, x)
    text.add("gate_up = MatMul(own, w13_e)")
    hidden = swiglu(text, "gate_up", "act_", dtype="f32")
    if attrs["act_quant"] == "ue8m0":
        hidden = fake_quantize(text, hidden, "h_", dtype="f32", bodies="ort")
    text.add(f"out = MatMul({hidden}, w2_e)")
    _add_rows(text, "out")
    text.add("}>(y0, experts, hit, w13, w2)")
    inputs = ["x", "expert_ids", "expert_weights", "w13", "w2"]
    return text.function(FOLDED, inputs, ["y"], ["act_quant"], "MoeExperts with weights folded to f32")


def _start(text: Text, weights: str) -> None:
    """Write `experts` (their numbers), `hit` (whether each has a token) and `y0`, the zero sum."""
    text.add(f"""
  count1 = Shape<start = 0, end = 1>({weights})
  count = Squeeze(count1)
  count32 = Cast<to = {onnx_type("i32")}>(count)
  experts = Range({text.i32(0)}, count32, {text.i32(1)})
  x_shape = Shape(x)
  y0 = Expand({text.f32(0)}, x_shape)
  ids_flat = Reshape(expert_ids, {text.ints(-1)})
""")


def _open_scan(text: Text, slices: str, count: int) -> None:
    text.add(f"""
  ids_count = Shape(ids_flat)
  ones = Expand({text.i32(1)}, ids_count)
  none = Expand({text.i32(0)}, count1)
  marks = ScatterElements<axis = 0>(none, ids_flat, ones)
  hit = Cast<to = {onnx_type("bool")}>(marks)
  y = Scan<num_scan_inputs = {count + 2}, body = expert
    (sum, e, is_hit, {slices}) => (sum_out) {{
      sum_out = If (is_hit) <
        else_branch = idle () => (same) {{ same = Identity(sum) }},
        then_branch = busy () => (more) {{
""")


def _own_rows(text: Text, x: str) -> None:
    text.add(f"""
        mine = Equal(expert_ids, e)
        places = NonZero(mine)
        tokens = Gather<axis = 0>(places, {text.i64(0)})
        own = Gather<axis = 0>({x}, tokens)
""")


def _add_rows(text: Text, out: str) -> None:
    text.add(f"""
        at = Transpose<perm = [1, 0]>(places)
        share = GatherND(expert_weights, at)
        share2 = Unsqueeze(share, {text.ints(1)})
        part = Mul({out}, share2)
        tokens2 = Unsqueeze(tokens, {text.ints(1)})
        more = ScatterND<reduction = "add">(sum, tokens2, part)
      }}>
""")


def _exact_work(text: Text, attrs: Attrs, how: Specialization, x: str) -> None:
    _open_scan(text, "w13_e, w13_scale_e, w2_e, w2_scale_e", 4)
    _own_rows(text, x)
    out = _mlp(text, attrs, how, "own", ("w13_e", "w13_scale_e", "w2_e", "w2_scale_e"))
    _add_rows(text, out)
    text.add("}>(y0, experts, hit, w13, w13_scale, w2, w2_scale)")


def _all_rows(text: Text, attrs: Attrs, how: Specialization, x: str) -> None:
    names = ("w13", "w13_scale", "w2", "w2_scale")
    text.add(f"""
  y = Loop<body = expert
    (int64 e, bool going, sum) => (going_out, sum_out) {{
      going_out = Identity(going)
      e32 = Cast<to = {onnx_type("i32")}>(e)
      mine = Equal(expert_ids, e32)
      mine32 = Cast<to = {onnx_type("i32")}>(mine)
      mine_any = ReduceMax<keepdims = 1>(mine32, {text.ints(1)})
      hit32 = ReduceMax<keepdims = 0>(mine32)
      is_hit = Cast<to = {onnx_type("bool")}>(hit32)
      sum_out = If (is_hit) <
        else_branch = idle () => (same) {{ same = Identity(sum) }},
        then_branch = busy () => (more) {{
""")
    for name in names:
        text.add(f"{name}_e = Gather<axis = 0>({name}, e)")
    out = _mlp(text, attrs, how, x, ("w13_e", "w13_scale_e", "w2_e", "w2_scale_e"))
    text.add(f"""
        owner = Cast<to = {onnx_type("bool")}>(mine_any)
        kept = Where(mine, expert_weights, {text.f32(0)})
        share = ReduceSum<keepdims = 1>(kept, {text.ints(1)})
        part = Mul({out}, share)
        part_owned = Where(owner, part, {text.f32(0)})
        more = Add(sum, part_owned)
      }}>
  }}>(count, {text.table(np.array(True))}, y0)
""")


def _mlp(text: Text, attrs: Attrs, how: Specialization, x: str, names: tuple[str, str, str, str]) -> str:
    """Write one expert's down(silu(gate) · up) for rows that are already quantized; returns its f32 name.

    The output is rounded to the activation dtype first, as the operator promises.
    """
    w13, w13_scale, w2, w2_scale = names
    act = how.activations
    up = dequantize_weight(text, w13, w13_scale, "up_", how=how)
    hidden = swiglu(text, matmul_transposed(text, x, up, "mu_", dtype=act), "act_", dtype=act)
    if attrs["act_quant"] == "ue8m0":
        hidden = fake_quantize(text, hidden, "h_", dtype=act, bodies=how.bodies)
    down = dequantize_weight(text, w2, w2_scale, "down_", how=how)
    out = matmul_transposed(text, hidden, down, "md_", dtype=act)
    return cast(text, out, "out_f", to="f32", from_=act)
