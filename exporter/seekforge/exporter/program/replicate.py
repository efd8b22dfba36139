"""Trace each kind of layer once, and stamp the rest: the same graph as tracing all layers, at a tenth of the cost.

Layers of one kind differ in their names only. So a few layers are traced: of each run of equal layers the first two
(three at the start of a range, whose first layer reads what no other does), and the last layer, whose residual goes
elsewhere. Two neighbors of a run are compared node by node; the second is then copied for each layer that was left
out. The graph that results is byte for byte the one that a trace of all layers gives (tests compare them).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import onnx

from seekforge.common.errors import ProgramError
from seekforge.exporter.program.canonical_names import BEFORE, renumber, segments, sort_nodes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.program import layer_of


def layers_to_trace(config: ModelConfig, layer_range: tuple[int, int]) -> tuple[int, ...]:
    """Return the layers of [a, b) that must be traced; the others are copies of those."""
    start, stop = layer_range
    kept: list[int] = []
    for _, run in itertools.groupby(range(start, stop), key=config.is_moe_layer):
        layers = list(run)
        kept += layers[: 3 if layers[0] == start else 2]
    return tuple(dict.fromkeys([*kept, stop - 1]))


def stamp(
    model: onnx.ModelProto,
    traced: Sequence[int],
    layers: Sequence[int],
    *,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Return the graph of all `layers` from a graph of the `traced` ones.

    Args:
        model: graph without functions.
        traced: the layers in it, ascending, under their own numbers.
        layers: the layers wanted; those that are missing in `traced` follow two equal neighbors in it.
        inputs: the inputs of the result, in order.
        outputs: the names of its outputs, in order.

    Raises:
        ProgramError: two neighbors that should be equal differ (a bug of ours), or a name is missing.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    gaps = _gaps(traced, layers)
    if gaps:
        sort_nodes(result.graph)
        writer = _Writer(result.graph, traced)
        nodes = writer.write(gaps)
        del result.graph.node[:]
        result.graph.node.extend(nodes)
        result.graph.value_info.extend(writer.infos)
        known = {value.name: value for value in (*model.graph.output, *writer.outputs)}
    else:
        known = {value.name: value for value in model.graph.output}
    missing = [name for name in outputs if name not in known]
    if missing:
        raise ProgramError(f"stamp: no layer gives the output {missing[0]!r}")
    del result.graph.input[:], result.graph.output[:]
    result.graph.input.extend(inputs)
    result.graph.output.extend(known[name] for name in outputs)
    return result


def _gaps(traced: Sequence[int], layers: Sequence[int]) -> dict[int, list[int]]:
    """Return traced layer -> the layers to stamp behind it."""
    gaps: dict[int, list[int]] = {}
    last = None
    for layer in layers:
        if layer in traced:
            last = layer
        else:
            assert last is not None, "the first layer is always traced"
            gaps.setdefault(last, []).append(layer)
    return gaps


class _Writer:
    """Copies the nodes of template layers into the gaps."""

    def __init__(self, graph: onnx.GraphProto, traced: Sequence[int]) -> None:
        self._graph, self._traced = graph, list(traced)
        self._segments = segments(graph)
        self._nodes: dict[int, list[onnx.NodeProto]] = {}
        self._segment_of: dict[str, int] = {}
        for node, segment in zip(graph.node, self._segments, strict=True):
            self._nodes.setdefault(segment, []).append(node)
            self._segment_of.update((name, segment) for name in node.output)
        self._info = {value.name: value for value in graph.value_info}
        self._graph_outputs = {value.name: value for value in graph.output}
        self.infos: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def write(self, gaps: Mapping[int, Sequence[int]]) -> list[onnx.NodeProto]:
        """Return all nodes in order, copies included."""
        last_of = {segment: i for i, segment in enumerate(self._segments)}
        copied: dict[int, dict[str, str]] = {}  # template -> its values as the last copy calls them
        result = []
        for i, (node, segment) in enumerate(zip(self._graph.node, self._segments, strict=True)):
            node = _copy(node)
            for template, names in copied.items():
                if segment != template:
                    node.input[:] = [names.get(name, name) for name in node.input]
            result.append(node)
            if segment in gaps and last_of[segment] == i:
                before = self._traced[self._traced.index(segment) - 1]
                counterpart = self._match(before, segment)
                names: dict[str, str] = {}
                for layer in gaps[segment]:
                    nodes, names = self._stamp(segment, layer, counterpart, names)
                    result += nodes
                copied[segment] = names
        return result

    def _match(self, first: int, second: int) -> dict[str, str]:
        """Compare two layers node by node; return value of `first` -> the same value of `second`."""
        first_nodes, second_nodes = self._nodes[first], self._nodes[second]
        if len(first_nodes) != len(second_nodes):
            raise ProgramError(
                f"stamp: layer {first} has {len(first_nodes)} nodes, layer {second} has {len(second_nodes)}"
            )
        counterpart: dict[str, str] = {}
        for a, b in zip(first_nodes, second_nodes, strict=True):
            if _signature(a) != _signature(b):
                raise ProgramError(f"stamp: layers {first} and {second} differ in {a.name!r} and {b.name!r}")
            for x, y in zip(a.input, b.input, strict=True):
                if not self._same(x, y, first, second, counterpart):
                    raise ProgramError(f"stamp: {a.op_type} reads {x!r} in layer {first}, {y!r} in layer {second}")
            counterpart.update(zip(a.output, b.output, strict=True))
        return counterpart

    def _same(self, x: str, y: str, first: int, second: int, counterpart: Mapping[str, str]) -> bool:
        where = self._segment_of.get(x, BEFORE)
        if where == first:
            return counterpart[x] == y
        if where != BEFORE:  # from the layer before: what it is called there is its own affair
            return where < first and self._segment_of.get(y) == first
        return renumber(x, second) == y if layer_of(x) == first else x == y

    def _stamp(
        self, template: int, layer: int, counterpart: Mapping[str, str], before: Mapping[str, str]
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Copy `template` as `layer`.

        Args:
            template: a traced layer; its neighbor before is its equal.
            layer: the number of the copy.
            counterpart: value of the neighbor before -> value of the template.
            before: value of the template -> its name in the copy before; empty for the first copy.

        Returns:
            The nodes, and value of the template -> its name here.
        """
        names: dict[str, str] = {}
        nodes = []

        def read(name: str) -> str:
            where = self._segment_of.get(name, BEFORE)
            if where == template:
                return names[name]
            if where != BEFORE:
                in_template = counterpart[name]
                return before.get(in_template, in_template)
            return renumber(name, layer) if layer_of(name) == template else name

        for original in self._nodes[template]:
            node = _copy(original)
            node.name = f"{original.name}@{layer}"
            node.input[:] = [read(name) if name else "" for name in original.input]
            for i, name in enumerate(original.output):
                output = self._graph_outputs.get(name)
                names[name] = f"{name}@{layer}" if output is None else renumber(name, layer)
                node.output[i] = names[name]
                if output is not None:
                    self.outputs.append(_named(output, names[name]))
                elif name in self._info:
                    self.infos.append(_named(self._info[name], names[name]))
            nodes.append(node)
        return nodes, names


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _named(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _signature(node: onnx.NodeProto) -> tuple[str, str, int, int, list[bytes]]:
    """Return all of a node but its names."""
    attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
    return node.op_type, node.domain, len(node.input), len(node.output), attributes
