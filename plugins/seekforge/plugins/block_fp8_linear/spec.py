"""Contract of `BlockFp8Linear`: y = x · (weight · weight_scale)ᵀ (spec §5.2)."""

from seekforge.plugins.operator import Arg, Attr, OpSpec

#: op_type of the form that an engine for the CPU has: weights folded to f32 and transposed.
FOLDED = "FoldedLinear"

SPEC = OpSpec(
    name="BlockFp8Linear",
    version=1,
    doc="y = x · Wᵀ, W = weight · weight_scale in 128×128 blocks; products in FP8 blocks, sums in f32.",
    inputs=(
        Arg("x", "act", ("*lead", "K"), "input; K a multiple of 128"),
        Arg("weight", "fp8", ("N", "K"), "e4m3, out features by in features"),
        Arg("weight_scale", "f32", ("cdiv(N, 128)", "cdiv(K, 128)"), "multiplies to recover"),
    ),
    optional=(
        Arg("x_codes", "i32", ("*lead", "K // 4"), "bytes of e4m3, four to a word: x quantized; x is not read then"),
        Arg("x_scale", "f32", ("*lead", "KB"), "their scales; KB is K / 128"),
    ),
    outputs=(Arg("y", "act", ("*lead", "N"), "rounded once from the f32 sum"),),
    attrs=(Attr("act_quant", "str", "ue8m0: quantize x to e4m3 per 128 with power-of-two scales", ("ue8m0", "none")),),
)
