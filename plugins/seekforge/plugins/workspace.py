"""How much scratch memory an operator needs on a GPU, from its largest shapes. Pure Python: no torch, no TensorRT.

The plugin asks for this when the engine is built, and `plan` counts it. The cuts are those of the kernels: long work
is done in slices of rows, so scratch stays bounded however long a prompt or a context is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from seekforge.plugins.registry import SPECS
from seekforge.plugins.spec import cdiv

#: Rows of a step up to which a linear is cut along K, and thread blocks that such a cut aims at.
SPLIT_ROWS, SPLIT_BLOCKS, MAX_SPLITS = 64, 264, 16
#: The indexer keeps at most this many bytes of scores; longer prompts are scored in slices of rows.
SCORE_BYTES = 256 << 20
#: Bytes of histograms per row of a slice.
HISTOGRAM_BYTES = 8192
#: Sparse attention: rows per slice, parts that the keys of a row are cut into, and the query length from which a
#: sequence's cache is dequantised once instead of per row.
ATTENTION_ROWS, ATTENTION_SPLITS, PREFILL_QUERIES = 16, 8, 256
#: The experts' operator works on this many tokens at a time.
EXPERT_TOKENS = 2048
#: Slots of a cache block.
_BLOCK = 64
_ALIGNMENT = 256


def workspace_bytes(op: str, shapes: Sequence[Sequence[int]], attrs: Mapping[str, Any]) -> int:
    """Return the scratch bytes of one operator.

    Args:
        op: ONNX op_type.
        shapes: the largest shape of each input, in the order of the spec.
        attrs: attribute values of the spec.

    Raises:
        ShapeError: the shapes break the operator's contract.
    """
    bound = SPECS[op].bind(shapes, attrs)
    match op:
        case "BlockFp8Linear":
            rows = math.prod(bound["*lead"])
            parts = _quantised(rows, bound["K"]) + _linear_partials(min(rows, SPLIT_ROWS), bound["N"])
        case "DsaIndexer":
            rows, length = bound["B"] * bound["Q"], bound["MB"] * _BLOCK
            rows = min(rows, max(1, SCORE_BYTES // (4 * length)))
            parts = [4 * rows * length, HISTOGRAM_BYTES * rows]
        case "DsaAttention":
            heads, width = bound["H"], bound["C"]
            rows = min(bound["B"] * bound["Q"], ATTENTION_ROWS)
            parts = [4 * rows * ATTENTION_SPLITS * heads * (width + 1)]
            if bound["Q"] >= PREFILL_QUERIES:
                parts.append(bound["MB"] * _BLOCK * (width + bound["R"]) * 2)
        case "MoeExperts":
            tokens = min(bound["T"], EXPERT_TOKENS)
            routed, inner = tokens * bound["TOPK"], bound["I2"] // 2
            parts = [*_quantised(tokens, bound["H"]), *_quantised(routed, inner), 2 * routed * bound["H"]]
            parts.append(4 * (4 * routed + 2 * bound["E"] + 2))  # permutation, its inverse, tiles, offsets
        case _:
            parts = []
    return sum(cdiv(part, _ALIGNMENT) * _ALIGNMENT for part in parts)


def _quantised(rows: int, width: int) -> list[int]:
    """Bytes of [rows, width] in FP8 and of its scales, one f32 per 128."""
    return [rows * width, 4 * rows * cdiv(width, 128)]


def _linear_partials(rows: int, out: int) -> list[int]:
    splits = min(MAX_SPLITS, cdiv(SPLIT_BLOCKS, cdiv(out, 128)))
    return [4 * splits * rows * out] if splits > 1 else []
