"""Contract of `DsaAttention` (spec §3.5): sparse, absorbed, one latent key and value shared by all heads."""

from seekforge.plugins.operator import Arg, Attr, OpSpec

SPEC = OpSpec(
    name="DsaAttention",
    version=1,
    doc="o = Σ_s softmax_s(scale · (q_latent·c_s + q_pe·k_s)) · c_s over s in topk_indices; no valid s gives 0.",
    inputs=(
        Arg("q_latent", "act", ("B", "Q", "H", "C"), "q_nope · W_UK"),
        Arg("q_pe", "act", ("B", "Q", "H", "R"), "rotary queries after RoPE"),
        Arg("latent_cache", "kv", ("*latent",), "[NB·64, C+R]; fp8_ds: [NB, 64, C + 4·C/128 + 2·R] bytes"),
        Arg("block_table", "i32", ("B", "MB"), "block of each 64 positions"),
        Arg("topk_indices", "i32", ("B", "Q", "TOPK"), "logical positions, ascending, then −1"),
    ),
    outputs=(Arg("o_latent", "act", ("B", "Q", "H", "C"), "before W_UV"),),
    attrs=(
        Attr("scale", "float", "softmax scale, (nope + rope)^-½ · m²"),
        Attr("kv_format", "str", "layout and dtype of the latent cache", ("f32", "bf16", "fp8_ds")),
    ),
)
