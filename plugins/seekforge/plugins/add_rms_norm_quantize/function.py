"""`AddRmsNormQuantize` in standard ONNX operators: what a program has in its place, and bytes of e4m3 by arithmetic."""

import numpy as np
import onnx

from seekforge.plugins.add_rms_norm_quantize.spec import SPEC
from seekforge.plugins.functions.builder import Attrs, Text, cast, onnx_type, scale_blocks
from seekforge.plugins.functions.specialization import Specialization

_EXPONENTS = np.arange(-6, 9)


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return the norm of `x`, without a residual, and its codes.

    A magnitude in [2^e, 2^(e + 1)), e from -6 to 8, has the byte 8 (e + 6) + round(magnitude / 2^(e - 3)); smaller ones
    those of e = -6. What rounds up to 2^(e + 1) has its byte by the same sum.
    """
    text, act = Text(), how.activations
    wide = cast(text, "x", "x_wide", to="f32", from_=act)
    text.add("total = Identity(x)")
    epsilon = float(attrs["epsilon"])
    text.add(f"""
  squares = Mul({wide}, {wide})
  mean = ReduceMean<keepdims = 1>(squares, {text.ints(-1)})
  shifted = Add(mean, {text.f32(epsilon)})
  rms = Sqrt(shifted)
  normed = Div({wide}, rms)
  y_wide = Mul(normed, weight)
""")
    text.add(f"y = {'Identity' if act == 'f32' else f'Cast<to = {onnx_type(act)}>'}(y_wide)")
    rounded = cast(text, "y", "y_rounded", to="f32", from_=act)
    scaled, scales = scale_blocks(text, rounded, "q_")
    text.add(f"""
  lead = Shape<start = 0, end = -1>(x)
  per_row = Concat<axis = 0>(lead, {text.ints(-1)})
  scale = Reshape({scales}, per_row)
  kept = Abs({scaled})
  kept_axis = Unsqueeze(kept, {text.ints(-1)})
  reached = LessOrEqual({text.table(np.exp2(_EXPONENTS[1:]).astype(np.float32))}, kept_axis)
  reached_count = Cast<to = {onnx_type("i64")}>(reached)
  exponent = ReduceSum<keepdims = 0>(reached_count, {text.ints(-1)})
  steps = Gather<axis = 0>({text.table(np.exp2(3.0 - _EXPONENTS).astype(np.float32))}, exponent)
  in_steps = Mul(kept, steps)
  mantissa_wide = Round(in_steps)
  mantissa = Cast<to = {onnx_type("i64")}>(mantissa_wide)
  eights = Mul(exponent, {text.i64(8)})
  byte = Add(eights, mantissa)
  is_negative = Less({scaled}, {text.f32(0.0)})
  sign = Cast<to = {onnx_type("i64")}>(is_negative)
  high = Mul(sign, {text.i64(128)})
  unsigned = Add(byte, high)
  words_shape = Concat<axis = 0>(lead, {text.ints(-1)}, {text.ints(4)})
  fours = Reshape(unsigned, words_shape)
  placed = Mul(fours, {text.ints(1, 1 << 8, 1 << 16, 1 << 24)})
  word = ReduceSum<keepdims = 0>(placed, {text.ints(-1)})
  is_large = LessOrEqual({text.i64(1 << 31)}, word)
  large = Cast<to = {onnx_type("i64")}>(is_large)
  wrap = Mul(large, {text.i64(1 << 32)})
  signed = Sub(word, wrap)
  codes = Cast<to = {onnx_type("i32")}>(signed)
""")
    return text.body_of(SPEC)
