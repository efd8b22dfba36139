"""Which operators of an engine's graphs ONNX Runtime runs on a GPU, and which fall to the CPU inside of it.

An operator without a kernel of the CUDA provider is run by the CPU, with copies to and fro, and nothing but a log says
so. Here it is known at build, by name and type. Operators of which nothing is known count as without a kernel.

Source: ONNX Runtime @001d12d, docs/OperatorKernels.md, CUDAExecutionProvider.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

import onnx

from seekforge.common.dtypes import ONNX

_WORDS: Final = {number: name for name, number in ONNX.items()} | {onnx.TensorProto.BOOL: "bool"}
_NUMBERS: Final = frozenset({"f32", "i32", "i64"})
_ALL: Final = _NUMBERS | {"bool"}
_FLOATS: Final = frozenset({"f32"})
#: Operator -> types of its first data input that have a kernel, of those that engines have.
_KERNELS: Final[Mapping[str, frozenset[str]]] = {
    **dict.fromkeys(("Abs", "Add", "Div", "Mul", "Sub", "Max", "Min", "ReduceMax", "ReduceSum", "TopK"), _NUMBERS),
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Range", "Tile", "CumSum", "Where"), _NUMBERS),
    **dict.fromkeys(("Concat", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Reshape", "Slice"), _ALL),
    **dict.fromkeys(("ScatterElements", "ScatterND", "Shape", "Size", "Split", "Squeeze", "Unsqueeze"), _ALL),
    **dict.fromkeys(("Transpose", "Equal", "NonZero", "ConstantOfShape", "If", "Loop", "Scan"), _ALL),
    **dict.fromkeys(("Ceil", "Einsum", "Erf", "Exp", "Floor", "Gelu", "Gemm", "IsInf", "IsNaN", "Log"), _FLOATS),
    **dict.fromkeys(("LayerNormalization", "MatMul", "Pow", "RMSNormalization", "ReduceMean", "Relu"), _FLOATS),
    **dict.fromkeys(("Reciprocal", "RotaryEmbedding", "Round", "Sigmoid", "Softmax", "Sqrt", "Tanh"), _FLOATS),
    "And": frozenset({"bool"}),
    "Not": frozenset({"bool"}),
    "Or": frozenset({"bool"}),
    "Cast": _ALL | {"f8e4m3", "bf16"},
    "Clip": frozenset({"f32", "i64"}),
    "GatherND": frozenset({"f32", "i64", "bool"}),
    "Neg": _NUMBERS,
    "Pad": frozenset({"f32", "bool"}),
}
#: Which input is the data, where that is not the first.
_DATA: Final = {"Where": 1}


def on_the_cpu(model: onnx.ModelProto) -> dict[str, int]:
    """Return the operators of a graph and its inner graphs that have no kernel on a GPU: "Pad i64" -> how many."""
    inferred = onnx.shape_inference.infer_shapes(model)
    return dict(Counter(name for name in _without_kernel(inferred.graph, {})))


def _without_kernel(graph: onnx.GraphProto, outer: Mapping[str, int]) -> Iterator[str]:
    types = dict(outer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _without_kernel(attribute.g, types)
        if node.op_type == "Constant":
            if node.attribute and node.attribute[0].name == "value":
                types[node.output[0]] = node.attribute[0].t.data_type
            continue
        place = _DATA.get(node.op_type, 0)
        number = types.get(node.input[place], 0) if len(node.input) > place else 0
        word = _WORDS.get(number, "?")
        if node.domain or word not in _KERNELS.get(node.op_type, frozenset()):
            yield f"{node.op_type} {word}"
