"""Products of BF16 weights whose results are f32: the head, the router, the indexer's head weights.

A program has them in standard operators, both operands cast to f32. TensorRT would run the weight's cast in every step
and keep its result, so where it has the operator as a plugin a `Bf16Linear` node takes the place of casts, transpose
and product, and the weight keeps its two bytes. Elsewhere the weight is an f32 input (`prepare.widen_weights`).
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import TensorProto, helper

from seekforge.plugins.bf16_linear.spec import SPEC
from seekforge.plugins.onnx_schema import PLUGIN_NAMESPACE
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION


def bf16_linear_weights(model: onnx.ModelProto, weights: Collection[str]) -> set[str]:
    """Return the weights that a graph reads in products of two operands cast to f32 and nowhere else.

    Args:
        model: canonical, or specialized with bf16 activations.
        weights: BF16 inputs that are cast to f32 wherever they are read (`prepare.wide_weights`).
    """
    readers, results = _readers(model), {value.name for value in model.graph.output}
    makers = {name: node for node in model.graph.node for name in node.output}
    linears = set()
    for weight in weights:
        columns = [second for first in readers.get(weight, ()) for second in readers.get(first.output[0], ())]
        products = [product for one in columns for product in readers.get(one.output[0], ())]
        inside = {name for one in (*readers.get(weight, ()), *columns) for name in one.output}
        if (
            products
            and inside.isdisjoint(results)
            and all(_swaps(one) for one in columns)
            and all(one.op_type == "MatMul" and one.input[0] not in inside for one in products)
            and all(_widens(makers.get(one.input[0])) for one in products)
        ):
            linears.add(weight)
    return linears


def use_bf16_linear(model: onnx.ModelProto, weights: Collection[str]) -> None:
    """Put `Bf16Linear` in place of the products of `weights`, and drop the casts that nobody reads any more.

    Args:
        model: specialized graph, changed in place.
        weights: found by `bf16_linear_weights`.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in makers or not _swaps(makers[node.input[1]]):
            continue
        cast = makers.get(makers[node.input[1]].input[0])
        if cast is None or cast.input[0] not in weights:
            continue
        weight = cast.input[0]
        made = helper.make_node(
            SPEC.name,
            [makers[node.input[0]].input[0], weight],
            list(node.output),
            name=f"{weight.rpartition('.')[0]}/{SPEC.name}",
            domain=DOMAIN,
            **{PLUGIN_NAMESPACE: DOMAIN},
        )
        node.CopyFrom(made)
    _drop_unread(graph)
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove casts and transposes whose results nobody reads, the last ones first."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if node.op_type in ("Cast", "Transpose") and node.output[0] not in read:
            continue
        read.update(node.input)
        kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _readers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _swaps(node: onnx.NodeProto) -> bool:
    """Whether a node turns rows into columns."""
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute if a.name == "perm"] == [[1, 0]]


def _widens(node: onnx.NodeProto | None) -> bool:
    """Whether a node casts to f32; in a graph of bf16 activations that is from bf16."""
    return (
        node is not None
        and node.op_type == "Cast"
        and [a.i for a in node.attribute if a.name == "to"] == [TensorProto.FLOAT]
    )
