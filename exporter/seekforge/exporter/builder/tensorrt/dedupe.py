"""Graphs that differ in names alone: the layers of a model, which one compiled plan serves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, MutableSequence
from dataclasses import dataclass
from typing import Any

import onnx

from seekforge.common.errors import ProgramError
from seekforge.exporter.program.canonical_names import has_subgraph


@dataclass(frozen=True)
class Form:
    """What a graph is without its names.

    Attributes:
        digest: equal for graphs that differ in names alone.
        names: the names of all values, in the order in which they first appear. Graphs of one digest correspond place
            by place.
    """

    digest: str
    names: tuple[str, ...]


def form_of(model: onnx.ModelProto, marked: Collection[str] = ()) -> Form:
    """Return the form of a graph.

    Args:
        model: without subgraphs.
        marked: values with a property of their own, which is part of the form.

    Raises:
        ProgramError: a node has a subgraph: values in it would be missed.
    """
    number: dict[str, int] = {}

    def place(name: str) -> str:
        return str(number.setdefault(name, len(number))) if name else ""

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for field in ("doc_string", "metadata_props"):
        bare.ClearField(field)
    graph = bare.graph
    for field in ("name", "doc_string", "metadata_props"):
        graph.ClearField(field)
    for value in (*graph.input, *graph.output):
        for field in ("doc_string", "metadata_props"):
            value.ClearField(field)
    for value in graph.input:
        value.name = place(value.name)
    for node in graph.node:
        if has_subgraph(node):
            raise ProgramError(f"build: {node.op_type} {node.name!r} has a subgraph, expected operators only")
        for field in ("name", "doc_string", "metadata_props"):
            node.ClearField(field)
        node.input[:] = [place(name) for name in node.input]
        node.output[:] = [place(name) for name in node.output]
    for value in graph.output:
        value.name = place(value.name)
    _put_in_order(graph.initializer, place)
    _put_in_order(graph.value_info, place)
    digest = hashlib.sha256(bare.SerializeToString(deterministic=True))
    digest.update(",".join(str(i) for name, i in number.items() if name in marked).encode())
    return Form(digest.hexdigest(), tuple(number))


def _put_in_order(values: MutableSequence[Any], place: Callable[[str], str]) -> None:
    """Rename a field's entries, whose order says nothing, and sort them by their new names."""
    for value in values:
        value.name = place(value.name)
    ordered = sorted(values, key=lambda value: int(value.name))
    del values[:]
    values.extend(ordered)
