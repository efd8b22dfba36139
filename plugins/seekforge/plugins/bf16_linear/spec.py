"""Contract of `Bf16Linear`: y = x · Wᵀ of bf16 values, summed and given in f32 (spec §5.3)."""

from seekforge.plugins.operator import Arg, OpSpec

SPEC = OpSpec(
    name="Bf16Linear",
    version=1,
    doc="y = x · Wᵀ in f32, W as the checkpoint has it; products of bf16 values are exact, so sums alone round.",
    inputs=(
        Arg("x", "act", ("*lead", "K"), "input"),
        Arg("weight", "act", ("N", "K"), "out features by in features"),
    ),
    outputs=(Arg("y", "f32", ("*lead", "N"), "the f32 sum, not rounded to the dtype of x"),),
    attrs=(),
)
