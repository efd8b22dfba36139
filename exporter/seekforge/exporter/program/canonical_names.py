"""Canonical names: what a value is called says where in the model it is, and depends on the graph alone.

A tracer numbers values in the order in which it met them, so the same graph has other names when it was traced in
another way. Here a node is named after the module whose weight it reads, or after its layer, and its operator:
`layers.3.mlp.down/BlockFp8Linear`, `layers.3/Mul_4`. Engines show these names in profiles and errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import onnx

from seekforge.common.errors import ProgramError
from seekforge.exporter.models import FAMILIES, load_family
from seekforge.formats.program import LAYER, layer_of

#: Inputs that only the results behind the last layer read, in all families.
_ENDS = {"logits_index"} | {
    row.name for known in FAMILIES for row in load_family(known).end_parameters() if row.is_behind
}
#: What `segments` says of nodes that belong to no layer.
BEFORE, AFTER = -1, 1 << 30


def renumber(name: str, layer: int) -> str:
    """Return an input's or output's name for another layer; names outside layers stay."""
    match = LAYER.match(name)
    if match is None:
        return name
    group = 1 if match[1] else 2
    return f"{name[: match.start(group)]}{layer}{name[match.end(group) :]}"


def has_subgraph(node: onnx.NodeProto) -> bool:
    """Whether values stand inside a node, where who looks at its inputs and outputs misses them."""
    return any(one.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for one in node.attribute)


def segments(graph: onnx.GraphProto) -> list[int]:
    """Return for each node the layer it belongs to: the last one among all that its result depends on.

    `BEFORE` for what depends on no layer (positions, tables, shapes), `AFTER` for the final norm and the head.
    """
    level: dict[str, int] = {}
    for value in graph.input:
        layer = layer_of(value.name)
        level[value.name] = layer if layer is not None else AFTER if value.name in _ENDS else BEFORE
    result = []
    for node in graph.node:
        deepest = max((level.get(name, BEFORE) for name in node.input), default=BEFORE)
        result.append(deepest)
        level.update((name, deepest) for name in node.output)
    return result


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put nodes in the order of layers, in place; inside a layer they stay as they are.

    A node never depends on a later segment, so the order stays topological. A tracer writes the end of a layer and
    the start of the next in turns.
    """
    where = segments(graph)
    nodes = [graph.node[i] for i in sorted(range(len(where)), key=where.__getitem__)]
    ordered = onnx.GraphProto(node=nodes)
    del graph.node[:]
    graph.node.extend(ordered.node)


def canonicalise(model: onnx.ModelProto, weights: Collection[str]) -> None:
    """Sort nodes by layer, rename nodes, values and constants of `model` in place, and sort constants by first use.

    Graph inputs and outputs keep their names.

    Args:
        model: graph without functions.
        weights: the inputs that are weights.

    Raises:
        ProgramError: a node has a subgraph: values in it would be missed.
    """
    graph = model.graph
    sort_nodes(graph)
    fixed = {value.name for value in (*graph.input, *graph.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    renamed: dict[str, str] = {name: name for name in fixed}
    seen: Counter[str] = Counter()
    order: list[onnx.TensorProto] = []
    for node, segment in zip(graph.node, segments(graph), strict=True):
        if has_subgraph(node):
            raise ProgramError(f"trace left the subgraph of {node.op_type} {node.name!r}, expected operators only")
        for name in node.input:
            if name in constants and name not in renamed:
                renamed[name] = f"constant.{len(order)}"
                order.append(constants[name])
        base = f"{_place(node.input, segment, weights)}/{node.op_type}"
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1
        node.input[:] = [renamed[name] if name else "" for name in node.input]
        many = len(node.output) > 1
        for i, name in enumerate(node.output):
            renamed.setdefault(name, f"{node.name}:{i}" if many else node.name)
        node.output[:] = [renamed[name] for name in node.output]
    _rename_tensors(graph, order, renamed)


def _place(inputs: Iterable[str], segment: int, weights: Collection[str]) -> str:
    """Return the module whose weight is among `inputs`, else the layer or end that the node belongs to."""
    for name in inputs:
        if name in weights and (segment in (BEFORE, AFTER) or layer_of(name) == segment):
            return name.rpartition(".")[0] or name
    return {BEFORE: "step", AFTER: "head"}.get(segment, f"layers.{segment}")


def _rename_tensors(graph: onnx.GraphProto, order: list[onnx.TensorProto], renamed: Mapping[str, str]) -> None:
    kept = []
    for tensor in order:
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = renamed[tensor.name]
        kept.append(copy)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    known = {value.name: value for value in graph.value_info}
    infos = []
    constant = {tensor.name for tensor in kept}
    for old, new in renamed.items():
        if old in known and new not in constant:
            info = onnx.ValueInfoProto()
            info.CopyFrom(known[old])
            info.name = new
            infos.append(info)
    del graph.value_info[:]
    graph.value_info.extend(infos)
