"""The operators by ONNX op_type. Only contracts: imports neither torch nor onnx."""

from __future__ import annotations

from typing import Final

from seekforge.plugins.bf16_linear.spec import SPEC as _BF16_LINEAR
from seekforge.plugins.block_fp8_linear.spec import SPEC as _BLOCK_FP8_LINEAR
from seekforge.plugins.dsa_attention.spec import SPEC as _DSA_ATTENTION
from seekforge.plugins.dsa_cache_write.spec import SPEC as _DSA_CACHE_WRITE
from seekforge.plugins.dsa_indexer.spec import SPEC as _DSA_INDEXER
from seekforge.plugins.moe_experts.spec import SPEC as _MOE_EXPERTS
from seekforge.plugins.moe_route.spec import SPEC as _MOE_ROUTE
from seekforge.plugins.operator import OpSpec
from seekforge.plugins.sum_ranks.spec import SPEC as _SUM_RANKS

#: op_type -> contract, in the order in which a layer uses them; the collective last.
SPECS: Final[dict[str, OpSpec]] = {
    spec.name: spec
    for spec in (
        _BLOCK_FP8_LINEAR,
        _BF16_LINEAR,
        _DSA_CACHE_WRITE,
        _DSA_INDEXER,
        _DSA_ATTENTION,
        _MOE_ROUTE,
        _MOE_EXPERTS,
        _SUM_RANKS,
    )
}

#: Operators whose products have FP8 weights: what precision is about.
FP8_OPS: Final = (_BLOCK_FP8_LINEAR.name, _MOE_EXPERTS.name)
#: The operator that a GPU build puts in place of products of BF16 weights with f32 results; programs have none.
BF16_LINEAR: Final = _BF16_LINEAR.name
#: Operators that know the cache's byte layout, which standard operators cannot read.
CACHE_OPS: Final = (_DSA_CACHE_WRITE.name, _DSA_INDEXER.name, _DSA_ATTENTION.name)
