"""The operators by ONNX op_type, and the groups of them that others ask for. Imports neither torch nor onnx.

A new operator is a folder, and its line here twice: where it is imported, and in its place of the order.
"""

from __future__ import annotations

from typing import Final

from seekforge.plugins.add_rms_norm_quantize.operator import OPERATOR as _ADD_RMS_NORM_QUANTIZE
from seekforge.plugins.bf16_linear.operator import OPERATOR as _BF16_LINEAR
from seekforge.plugins.block_fp8_linear.operator import OPERATOR as _BLOCK_FP8_LINEAR
from seekforge.plugins.dsa_attention.operator import OPERATOR as _DSA_ATTENTION
from seekforge.plugins.dsa_cache_write.operator import OPERATOR as _DSA_CACHE_WRITE
from seekforge.plugins.dsa_indexer.operator import OPERATOR as _DSA_INDEXER
from seekforge.plugins.mla_attention.operator import OPERATOR as _MLA_ATTENTION
from seekforge.plugins.mla_cache_write.operator import OPERATOR as _MLA_CACHE_WRITE
from seekforge.plugins.moe_experts.operator import OPERATOR as _MOE_EXPERTS
from seekforge.plugins.moe_route.operator import OPERATOR as _MOE_ROUTE
from seekforge.plugins.operator import KernelForm, Operator, OpSpec
from seekforge.plugins.sum_ranks.operator import OPERATOR as _SUM_RANKS

#: op_type -> description, in the order in which a layer uses them; the collective last.
OPERATORS: Final[dict[str, Operator]] = {
    operator.spec.name: operator
    for operator in (
        _ADD_RMS_NORM_QUANTIZE,
        _BLOCK_FP8_LINEAR,
        _BF16_LINEAR,
        _DSA_CACHE_WRITE,
        _DSA_INDEXER,
        _DSA_ATTENTION,
        _MLA_CACHE_WRITE,
        _MLA_ATTENTION,
        _MOE_ROUTE,
        _MOE_EXPERTS,
        _SUM_RANKS,
    )
}
#: op_type -> contract, in the same order.
SPECS: Final[dict[str, OpSpec]] = {op: operator.spec for op, operator in OPERATORS.items()}
#: op_type -> kernels, of the operators that have some.
KERNEL_FORMS: Final[dict[str, KernelForm]] = {
    op: operator.kernels for op, operator in OPERATORS.items() if operator.kernels is not None
}
#: Operators that have kernels.
WITH_KERNELS: Final = tuple(KERNEL_FORMS)
#: Operators that the library for CPUs has.
NATIVE: Final = tuple(op for op, operator in OPERATORS.items() if operator.native)
#: Folded forms of operators that the library for CPUs has.
NATIVE_FORMS: Final = tuple(
    operator.folded.op_type for operator in OPERATORS.values() if operator.folded is not None and operator.folded.native
)

#: Operators whose products have FP8 weights: what precision is about.
FP8_OPS: Final = tuple(op for op, spec in SPECS.items() if spec.has_input_of("fp8"))
#: Operators that know the cache's byte layout, which standard operators cannot read.
CACHE_OPS: Final = tuple(op for op, spec in SPECS.items() if spec.has_input_of("kv"))
#: The linear of FP8 weights, which tables of parameters name.
BLOCK_FP8_LINEAR: Final = _BLOCK_FP8_LINEAR.spec.name
#: The operator that a GPU build puts in place of norms whose results FP8 linears read; programs have none.
ADD_RMS_NORM_QUANTIZE: Final = _ADD_RMS_NORM_QUANTIZE.spec.name
#: The operator that a GPU build puts in place of products of BF16 weights with f32 results; programs have none.
BF16_LINEAR: Final = _BF16_LINEAR.spec.name
