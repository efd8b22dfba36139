"""Linears that multiply one value, as one: a single launch then streams both weights.

The table of a family says which (`Parameter.beside`). Programs keep them apart, as checkpoints do; here a program's
graphs, its inputs and the recipes of its weights are rewritten before anything is built of them, so whatever follows
knows the joined weight alone. Its rows are those of both: results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from seekforge.exporter.builder.tensorrt.passes.nodes import readers_of
from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import joined_name, joins
from seekforge.exporter.program.graph_io import tensor_spec
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.program import GraphIO, OpUse, Program, layer_of
from seekforge.formats.weight_recipes import Recipe, concat
from seekforge.plugins.functions.attach import read_attrs
from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.registry import BLOCK_FP8_LINEAR

_ENDINGS = ("weight", "weight_scale")


@dataclass(frozen=True)
class _Pair:
    """Two nodes of a graph that become one.

    Attributes:
        first, second: the nodes, in the order in which their rows are stacked.
        name: the module of the joined weight.
        rows: out features of both.
    """

    first: onnx.NodeProto
    second: onnx.NodeProto
    name: str
    rows: tuple[int, int]


def join_linears(
    program: Program,
    graphs: Mapping[str, onnx.ModelProto],
    bindings: Mapping[str, Mapping[str, Recipe]],
    config: ModelConfig,
) -> tuple[Program, dict[str, onnx.ModelProto], dict[str, dict[str, Recipe]]]:
    """Return a program, its graphs and its recipes with joined linears.

    Args:
        program: what describes the graphs.
        graphs: canonical graphs by name; nothing of them is changed.
        bindings: graph -> weight input -> recipe.
        config: the model's config.
    """
    made, described = dict(graphs), dict(program.graphs)
    recipes = {name: dict(of_graph) for name, of_graph in bindings.items()}
    fewer = 0
    for name, graph in graphs.items():
        pairs = list(_pairs(graph, config))
        if pairs:
            made[name] = _joined(graph, pairs)
            recipes[name] = _recipes(recipes[name], pairs)
            described[name] = _described(described[name], made[name])
            fewer += len(pairs)
    ops = dict(program.ops)
    if fewer:
        use = ops[BLOCK_FP8_LINEAR]
        ops[BLOCK_FP8_LINEAR] = OpUse(version=use.version, attributes=use.attributes, num_nodes=use.num_nodes - fewer)
    return program.model_copy(update={"graphs": described, "ops": ops}), made, recipes


def _pairs(model: onnx.ModelProto, config: ModelConfig) -> Iterator[_Pair]:
    """Yield the nodes that the family's table joins, where they read one value and the first ends with a block.

    A weight, or a scale, that anything else reads stays what it is.
    """
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    readers = readers_of(model.graph)
    linears = {
        node.input[1]: node
        for node in model.graph.node
        if node.domain == DOMAIN
        and node.op_type == BLOCK_FP8_LINEAR
        and all(name in shapes and len(readers[name]) == 1 for name in node.input[1:3])
    }
    layers = dict.fromkeys(layer for layer in map(layer_of, linears) if layer is not None)
    for layer in layers:
        for one, other in joins(family_of(config).layer_parameters(config.layer_kind(layer))):
            prefix = f"layers.{layer}."
            first, second = (linears.get(f"{prefix}{parameter.name}.weight") for parameter in (one, other))
            if (
                first is None
                or second is None
                or first.input[0] != second.input[0]
                or read_attrs(first) != read_attrs(second)
            ):
                continue
            rows = shapes[first.input[1]][0].dim_value, shapes[second.input[1]][0].dim_value
            if rows[0] % FP8_BLOCK == 0:
                yield _Pair(first, second, prefix + joined_name(one, other), rows)


def _joined(model: onnx.ModelProto, pairs: Sequence[_Pair]) -> onnx.ModelProto:
    """Return the graph with one node for each pair, in the place of the one that comes first, and a split behind it."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    by_output = {node.output[0]: pair for pair in pairs for node in (pair.first, pair.second)}
    sizes: dict[tuple[int, int], str] = {}
    nodes: list[onnx.NodeProto] = []
    written: set[str] = set()
    for node in model.graph.node:
        pair = by_output.get(node.output[0]) if node.output else None
        if pair is None:
            nodes.append(node)
        elif pair.name not in written:
            written.add(pair.name)
            split = sizes.setdefault(pair.rows, f"joined.{pair.rows[0]}.{pair.rows[1]}")
            nodes += _nodes(pair, split)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(np.array(rows, np.int64), name) for rows, name in sizes.items())
    _join_inputs(graph, pairs)
    return result


def _nodes(pair: _Pair, sizes: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Return the joined product, and the split that gives what both nodes gave."""
    product = onnx.NodeProto()
    product.CopyFrom(pair.first)
    product.name = f"{pair.name}/{BLOCK_FP8_LINEAR}"
    product.input[1:] = [f"{pair.name}.{ending}" for ending in _ENDINGS]
    product.output[:] = [product.name]
    outputs = [pair.first.output[0], pair.second.output[0]]
    return product, helper.make_node("Split", [product.name, sizes], outputs, f"{pair.name}/Split", axis=-1)


def _join_inputs(graph: onnx.GraphProto, pairs: Sequence[_Pair]) -> None:
    """Put the joined weight and its scales in the place of those of the first node, and drop those of the second."""
    stays = {
        name: (f"{pair.name}.{ending}", second)
        for pair in pairs
        for ending, name, second in zip(_ENDINGS, pair.first.input[1:3], pair.second.input[1:3], strict=True)
    }
    known = {value.name: value for value in graph.input}
    goes = {second for _, second in stays.values()}
    inputs = []
    for value in graph.input:
        if value.name in stays:
            name, second = stays[value.name]
            joined, dims = onnx.ValueInfoProto(), known[second].type.tensor_type.shape.dim
            joined.CopyFrom(value)
            joined.name = name
            joined.type.tensor_type.shape.dim[0].dim_value += dims[0].dim_value
            inputs.append(joined)
        elif value.name not in goes:
            inputs.append(value)
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
    del graph.input[:]
    graph.input.extend(kept)


def _recipes(recipes: Mapping[str, Recipe], pairs: Sequence[_Pair]) -> dict[str, Recipe]:
    """Return the recipes of a graph's weights with those of pairs stacked."""
    result = dict(recipes)
    for pair in pairs:
        for ending, first, second in zip(_ENDINGS, pair.first.input[1:3], pair.second.input[1:3], strict=True):
            result[f"{pair.name}.{ending}"] = concat([result.pop(first), result.pop(second)])
    return result


def _described(io: GraphIO, model: onnx.ModelProto) -> GraphIO:
    """Return the description of a graph whose weights were joined: what is new is a weight."""
    known = {spec.name: spec for spec in io.inputs}
    inputs = (known.get(value.name) or tensor_spec(value, "weight") for value in model.graph.input)
    return io.model_copy(update={"inputs": tuple(inputs)})
