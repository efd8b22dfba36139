"""Contract of `MlaCacheWrite` (spec §3.3, §7): of layers that cache no indexer key.

Slot −1 (a padded row) is sent to slot 0: block 0 is scrap and never handed out, so a padded row changes no byte that
anyone reads.
"""

from seekforge.plugins.operator import Arg, Attr, OpSpec

SPEC = OpSpec(
    name="MlaCacheWrite",
    version=2,
    doc="Write one latent and rotary key per token into the paged cache at slot_mapping.",
    inputs=(
        Arg("latent_cache", "kv", ("*latent",), "[NB·64, C+R]; fp8_ds: [NB, 64, C + 4·C/128 + 2·R] bytes"),
        Arg("c", "act", ("B", "Q", "C"), "latent behind its norm"),
        Arg("k_pe", "act", ("B", "Q", "R"), "rotary key after RoPE"),
        Arg("slot_mapping", "i64", ("B", "Q"), "block_id · 64 + offset; −1 pads"),
    ),
    outputs=(Arg("latent_cache_out", "kv", ("*latent",), "alias of latent_cache"),),
    attrs=(
        Attr("kv_format", "str", "layout and dtype of the latent cache", ("f32", "bf16", "fp8_ds")),
        Attr("kv_fp8", "bool", "quantize and dequantize the latent before it is stored"),
    ),
    aliases=(("latent_cache_out", "latent_cache"),),
)
