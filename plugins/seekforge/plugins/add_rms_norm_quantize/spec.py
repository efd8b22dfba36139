"""Contract of `AddRmsNormQuantize`: the sum of two streams, its RMSNorm, and that as FP8 blocks (spec §3.1, §5.1).

Codes are words of four bytes, the first the lowest: TensorRT-RTX 1.7.1 takes no graph that has tensors of int8 and of
float8, and FP8 weights may be either.
"""

from seekforge.plugins.operator import Arg, Attr, OpSpec

SPEC = OpSpec(
    name="AddRmsNormQuantize",
    version=1,
    doc="total = x + residual; y = RMSNorm of the unrounded total; codes and scale: y quantized per 128.",
    inputs=(
        Arg("x", "act", ("*lead", "H"), "rows; H a multiple of 128"),
        Arg("weight", "f32", ("H",), "of the norm"),
    ),
    optional=(Arg("residual", "act", ("*lead", "R"), "added before the norm; R is H"),),
    outputs=(
        Arg("total", "act", ("*lead", "H"), "x, or x + residual, rounded once"),
        Arg("y", "act", ("*lead", "H"), "weight · total / rms(total) of the f32 total, rounded once"),
        Arg("codes", "i32", ("*lead", "H // 4"), "bytes of e4m3, four to a word: y over its scale"),
        Arg("scale", "f32", ("*lead", "cdiv(H, 128)"), "powers of two, as BlockFp8Linear quantizes"),
    ),
    attrs=(Attr("epsilon", "float", "added to the mean of squares"),),
)
