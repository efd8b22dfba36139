"""What several passes ask of a graph's nodes, or do to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx
from onnx import TensorProto, helper

from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return value -> the nodes that read it, each once, in their order."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def casts(node: onnx.NodeProto | None, to: int) -> bool:
    """Whether a node is a cast to this type."""
    return node is not None and node.op_type == "Cast" and [a.i for a in node.attribute if a.name == "to"] == [to]


def widens(node: onnx.NodeProto | None) -> bool:
    """Whether a node casts to f32; in a graph of bf16 activations that is from bf16."""
    return casts(node, TensorProto.FLOAT)


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], *, unread: Collection[str]) -> None:
    """Give a graph these nodes, without those whose first result nobody reads, the last ones first.

    Args:
        graph: changed in place; its outputs are read.
        nodes: all of them in order, also the graph's own.
        unread: operators whose nodes go if they are not read.
    """
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(list(nodes)):
        if node.op_type in unread and node.output[0] not in read:
            continue
        read.update(node.input)
        kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def import_domain(model: onnx.ModelProto) -> None:
    """Let a graph have operators of ours."""
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
