"""`Bf16Linear` in standard ONNX operators: what a program has in its place."""

import onnx

from seekforge.plugins.bf16_linear.spec import SPEC
from seekforge.plugins.functions.builder import Attrs, Text, cast
from seekforge.plugins.functions.specialization import Specialization


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return y = f32(x) · f32(weight)ᵀ."""
    text = Text()
    x = cast(text, "x", "x_wide", to="f32", from_=how.activations)
    weight = cast(text, "weight", "weight_wide", to="f32", from_=how.activations)
    text.add(f"columns = Transpose<perm = [1, 0]>({weight})")
    text.add(f"y = MatMul({x}, columns)")
    return text.body_of(SPEC)
