"""Contract of `MlaAttention`: dense, causal, absorbed, one latent key and value shared by all heads."""

from seekforge.plugins.operator import Arg, Attr, OpSpec

SPEC = OpSpec(
    name="MlaAttention",
    version=1,
    doc="o = Σ_s softmax_s(scale · (q_latent·c_s + q_pe·k_s)) · c_s over s ≤ position; a padded row gives 0.",
    inputs=(
        Arg("q_latent", "act", ("B", "Q", "H", "C"), "q_nope · W_UK"),
        Arg("q_pe", "act", ("B", "Q", "H", "R"), "rotary queries after RoPE"),
        Arg("latent_cache", "kv", ("*latent",), "[NB·64, C+R]"),
        Arg("block_table", "i32", ("B", "MB"), "block of each 64 positions"),
        Arg("positions", "i64", ("B", "Q"), "absolute; −1 pads"),
    ),
    outputs=(Arg("o_latent", "act", ("B", "Q", "H", "C"), "before W_UV"),),
    attrs=(
        Attr("scale", "float", "softmax scale, (nope + rope)^-½ · m²"),
        Attr("kv_format", "str", "dtype of the latent cache", ("f32", "bf16")),
    ),
)
