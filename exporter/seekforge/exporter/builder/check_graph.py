"""Whether a program's graph is one that `export` could have written: what a build or a drawing takes for granted.

An ONNX file can name tensors in any other file of the disk, hold functions that call themselves or double with every
call, leave out what a node needs, and name operators that nobody has. Half of that would be a traceback somewhere in
a rewrite; external data would be read. ONNX's own checker judges the structure; the rest is judged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from seekforge.common.dtypes import FROM_ONNX
from seekforge.common.errors import ShapeError
from seekforge.exporter.program.graph_io import shape_of
from seekforge.formats.program import GraphIO, TensorSpec
from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.registry import SPECS

if TYPE_CHECKING:
    import onnx

_STANDARD = ("", "ai.onnx")
#: What TensorRT's parser reads of a node beside the operator's own attributes.
_OF_PARSERS = ("plugin_namespace",)


class GraphFault(ValueError):
    """What a graph has that no program has."""


def check_graph(model: onnx.ModelProto, described: GraphIO) -> None:
    """Judge a graph.

    Args:
        model: the graph as it was read.
        described: what program.json says of its inputs and outputs.

    Raises:
        GraphFault: the first thing that does not fit.
    """
    import onnx

    check_text(model)
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise GraphFault(f"its tensor {tensor.name!r} lies in another file, expected values inside the graph")
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ONNX's have no common base
        first = next(iter(str(error).splitlines()), "")
        raise GraphFault(f"ONNX's checker refuses it: {first}") from None
    for function in model.functions:
        if function.domain != DOMAIN or function.name not in SPECS:
            raise GraphFault(
                f"it has the function {function.domain}.{function.name}, which is no operator of seekforge"
            )
    for node in model.graph.node:
        if node.domain == DOMAIN:
            _check_operator(node)
        elif node.domain not in _STANDARD:
            raise GraphFault(f"node {node.name!r} is of domain {node.domain!r}, expected {DOMAIN} or ONNX's own")
        elif any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise GraphFault(f"node {node.name!r} ({node.op_type}) has a graph of its own, which programs have not")
    for side, values, specs in (
        ("input", model.graph.input, described.inputs),
        ("output", model.graph.output, described.outputs),
    ):
        _check_side(side, list(values), specs)


def check_text(model: onnx.ModelProto) -> None:
    """Refuse text that is no UTF-8: protobuf reads it, and gives bytes where all of our code has names.

    Raises:
        GraphFault: the first that is none.
    """
    waiting: list[Any] = [model]  # messages
    while waiting:
        for field, value in waiting.pop().ListFields():
            values = value if field.is_repeated else (value,)
            if field.cpp_type == field.CPPTYPE_MESSAGE:
                waiting.extend(values)
            elif field.type == field.TYPE_STRING and bytes in map(type, values):
                odd = next(one for one in values if isinstance(one, bytes))
                raise GraphFault(f"its text {odd!r:.60} ({field.name}) is no UTF-8")


def _check_operator(node: onnx.NodeProto) -> None:
    import onnx

    spec = SPECS.get(node.op_type)
    if spec is None:
        raise GraphFault(f"no operator {DOMAIN}.{node.op_type}; known: {', '.join(SPECS)}")
    sides = ("inputs", node.input, spec.inputs), ("outputs", node.output, spec.outputs)
    for side, names, args in sides:
        if len(names) != len(args) or not all(names):
            raise GraphFault(f"{node.op_type} {node.name!r} has {len(names)} {side}, expected {len(args)}, all named")
    kinds = {"int": (int,), "bool": (int,), "float": (float,), "str": (bytes,)}
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    declared = {attribute.name: attribute for attribute in spec.attrs}
    for name, value in values.items():
        if name in declared and type(value) not in kinds[declared[name].kind]:
            raise GraphFault(f"{node.op_type} {node.name!r}: {name} is {value!r:.60}, expected {declared[name].kind}")
    try:
        plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
        spec.check_attrs({name: value for name, value in plain.items() if name not in _OF_PARSERS})
    except (ShapeError, UnicodeDecodeError) as error:
        raise GraphFault(f"node {node.name!r}: {error}") from None


def _check_side(side: str, values: list[onnx.ValueInfoProto], specs: tuple[TensorSpec, ...]) -> None:
    if [value.name for value in values] != [spec.name for spec in specs]:
        names = {value.name for value in values}.symmetric_difference(spec.name for spec in specs)
        name = min(names, default="in another order")
        raise GraphFault(f"its {side}s are not those of program.json: {name!r}")
    for value, spec in zip(values, specs, strict=True):
        dtype, shape = FROM_ONNX.get(value.type.tensor_type.elem_type), shape_of(value)
        if (dtype, shape) != (spec.dtype, spec.shape):
            raise GraphFault(
                f"its {side} {value.name!r} is {dtype} {list(shape)}, program.json says {spec.dtype} {list(spec.shape)}"
            )


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model, those of functions and of graphs inside graphs too."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    attributes = [attribute for function in model.functions for attribute in function.attribute_proto]
    while graphs or nodes:
        for graph in graphs:
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        nodes += [node for graph in graphs for node in graph.node]
        attributes += [attribute for node in nodes for attribute in node.attribute]
        graphs, nodes = [], []
        for one in attributes:
            yield from (one.t, *one.tensors)
            for sparse in (one.sparse_tensor, *one.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [one.g] * one.HasField("g") + list(one.graphs)
        attributes = []
