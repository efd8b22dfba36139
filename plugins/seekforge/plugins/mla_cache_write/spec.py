"""Contract of `MlaCacheWrite`.

Slot −1 (a padded row) is sent to slot 0: block 0 is scrap and never handed out, so a padded row changes no byte that
anyone reads.
"""

from seekforge.plugins.operator import Arg, Attr, OpSpec

SPEC = OpSpec(
    name="MlaCacheWrite",
    version=1,
    doc="Write one latent and rotary key per token into the paged cache at slot_mapping.",
    inputs=(
        Arg("latent_cache", "kv", ("*latent",), "[NB·64, C+R]"),
        Arg("c", "act", ("B", "Q", "C"), "latent after kv_a_layernorm"),
        Arg("k_pe", "act", ("B", "Q", "R"), "rotary key after RoPE"),
        Arg("slot_mapping", "i64", ("B", "Q"), "block_id · 64 + offset; −1 pads"),
    ),
    outputs=(Arg("latent_cache_out", "kv", ("*latent",), "alias of latent_cache"),),
    attrs=(Attr("kv_format", "str", "dtype of the latent cache", ("f32", "bf16")),),
    aliases=(("latent_cache_out", "latent_cache"),),
)
