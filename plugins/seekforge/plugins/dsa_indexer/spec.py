"""Contract of `DsaIndexer` (spec §3.6, §3.7).

Scores are f32. A NaN score counts as the lowest finite number and an infinite one as the largest finite
magnitude, so a row always returns min(index_topk, visible keys) positions.
"""

from seekforge.plugins.operator import Arg, Attr, OpSpec

SPEC = OpSpec(
    name="DsaIndexer",
    version=1,
    doc="Positions of the index_topk visible keys with the largest Σ_j w_j · ReLU(q_j · k), ascending, then −1.",
    inputs=(
        Arg("q", "act", ("B", "Q", "Hi", "D"), "indexer queries after RoPE and Hadamard; quantized inside"),
        Arg("w", "f32", ("B", "Q", "Hi"), "head weights with Hi^-½ · D^-½; may be negative"),
        Arg("index_cache", "kv", ("*index",), "[NB·64, D]; fp8_ds: [NB, 64·132] bytes"),
        Arg("block_table", "i32", ("B", "MB"), "block of each 64 positions; unused entries 0"),
        Arg("positions", "i64", ("B", "Q"), "absolute position; keys at ≤ position are visible; −1 pads"),
    ),
    outputs=(
        Arg(
            "topk_indices",
            "i32",
            ("B", "Q", "index_topk"),
            "logical positions, ascending, −1 fills; ties to the lowest",
        ),
    ),
    attrs=(
        Attr("index_topk", "int", "keys to pick per query"),
        Attr("indexer_fp8", "bool", "quantize each query head to FP8 first"),
        Attr("index_format", "str", "layout and dtype of the indexer cache", ("f32", "bf16", "fp8_ds")),
    ),
)
