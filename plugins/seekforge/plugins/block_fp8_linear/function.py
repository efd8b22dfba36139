"""`BlockFp8Linear` in standard ONNX operators."""

import onnx

from seekforge.plugins.block_fp8_linear.spec import FOLDED, SPEC
from seekforge.plugins.functions.builder import Attrs, Text, dequantize_weight, fake_quantize, matmul_transposed
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.operator import DOMAIN


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return y = x · (weight · weight_scale)ᵀ with `x` quantized and dequantized first if `act_quant` says so."""
    text = Text()
    x = "x"
    if attrs["act_quant"] == "ue8m0":
        x = fake_quantize(text, x, "q_", dtype=how.activations, bodies=how.bodies)
    weight = dequantize_weight(text, "weight", "weight_scale", "w_", how=how)
    y = matmul_transposed(text, x, weight, "mm_", dtype=how.activations)
    text.add(f"y = Identity({y})")
    return text.body_of(SPEC)


def folded_body(attrs: Attrs) -> onnx.FunctionProto:
    """Return `FoldedLinear(x, weight)`: y = x · weight, all f32, weight [K, N] dequantized at build time.

    The rounding of x is a node of its own, which the library of CPU operators has.
    """
    text = Text()
    if attrs["act_quant"] == "ue8m0":
        text.add(f"q = {DOMAIN}.FakeQuantize(x)")
    text.add(f"y = MatMul({'q' if attrs['act_quant'] == 'ue8m0' else 'x'}, weight)")
    return text.function(FOLDED, ["x", "weight"], ["y"], ["act_quant"], "BlockFp8Linear with its weight folded to f32")
