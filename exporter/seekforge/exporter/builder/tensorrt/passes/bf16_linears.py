"""Products of BF16 weights whose results are f32: the head, the router, the indexer's head weights.

A program has them in standard operators, both operands cast to f32. TensorRT would run the weight's cast in every step
and keep its result, so where it has the operator as a plugin a `Bf16Linear` node takes the place of casts, transpose
and product, and the weight keeps its two bytes. Elsewhere the weight is an f32 input (`prepare.widen_weights`).
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import helper

from seekforge.exporter.builder.tensorrt.passes.nodes import import_domain, readers_of, set_nodes, widens
from seekforge.plugins.bf16_linear.spec import SPEC
from seekforge.plugins.onnx_schema import PLUGIN_NAMESPACE
from seekforge.plugins.operator import DOMAIN


def bf16_linear_weights(model: onnx.ModelProto, weights: Collection[str]) -> set[str]:
    """Return the weights that a graph reads in products of two operands cast to f32 and nowhere else.

    Args:
        model: canonical, or specialized with bf16 activations.
        weights: BF16 inputs that are cast to f32 wherever they are read (`prepare.wide_weights`).
    """
    readers, results = readers_of(model.graph), {value.name for value in model.graph.output}
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
            and all(widens(makers.get(one.input[0])) for one in products)
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
    set_nodes(graph, graph.node, unread=("Cast", "Transpose"))
    import_domain(model)


def _swaps(node: onnx.NodeProto) -> bool:
    """Whether a node turns rows into columns."""
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute if a.name == "perm"] == [[1, 0]]
