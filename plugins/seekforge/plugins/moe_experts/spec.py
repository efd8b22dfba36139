"""Contract of `MoeExperts` (spec §4): y = Σ weight · down(silu(gate(x)) · up(x)), FP8 weights in 128×128 blocks.

Weights in NVFP4 are bytes (`quantization.nvfp4.to_rows`): rows of 9 bytes for 16 values say so by their width.
"""

from seekforge.plugins.operator import Arg, Attr, OpSpec

#: op_type of the form that an engine for the CPU has: weights folded to f32 and transposed.
FOLDED = "FoldedExperts"

SPEC = OpSpec(
    name="MoeExperts",
    version=1,
    doc="Run each token's experts and add their outputs times their weights in f32.",
    inputs=(
        Arg("x", "act", ("T", "H"), "tokens"),
        Arg(
            "expert_ids",
            "i32",
            ("T", "TOPK"),
            "all different; −1 (of another rank) adds nothing",
        ),
        Arg("expert_weights", "f32", ("T", "TOPK"), "multiply the experts' outputs"),
        Arg("w13", "fp8", ("E", "I2", "W13"), "gate rows, then up rows; W13 is H, in NVFP4 9 H / 16"),
        Arg("w13_scale", "f32", ("E", "cdiv(I2, 128)", "cdiv(H, 128)"), "multiplies to recover"),
        Arg("w2", "fp8", ("E", "H", "I2 // 2 * W13 // H"), "down projection"),
        Arg("w2_scale", "f32", ("E", "cdiv(H, 128)", "cdiv(I2 // 2, 128)"), "multiplies to recover"),
    ),
    optional=(
        Arg("x_codes", "i32", ("T", "H // 4"), "bytes of e4m3, four to a word: x quantized; x is not read then"),
        Arg("x_scale", "f32", ("T", "HB"), "their scales; HB is H / 128"),
        Arg("shared_w13", "fp8", ("S2", "H"), "of an expert that every token has, with weight 1; S2 is at most I2"),
        Arg("shared_w13_scale", "f32", ("cdiv(S2, 128)", "cdiv(H, 128)"), "multiplies to recover"),
        Arg("shared_w2", "fp8", ("H", "S2 // 2"), "its down projection; no NVFP4"),
        Arg("shared_w2_scale", "f32", ("cdiv(H, 128)", "cdiv(S2 // 2, 128)"), "multiplies to recover"),
    ),
    outputs=(Arg("y", "f32", ("T", "H"), "f32: what else is added comes before the one rounding"),),
    attrs=(Attr("act_quant", "str", "as in BlockFp8Linear, for both products", ("ue8m0", "none")),),
)


def takes_shared(inner: int, shared_inner: int) -> bool:
    """Return whether a shared expert of this width may be one more of experts of width `inner`."""
    return 0 < shared_inner <= inner and shared_inner % 128 == 0
