"""Trace each kind of layer once, and stamp the rest: the same graph as tracing all layers, at a tenth of the cost.

Layers of one kind differ in their names only. So a few layers are traced: of each run of equal layers the first two
(three at the start of a range, whose first layer reads what no other does), and the last layer, whose residual goes
elsewhere. Where kinds alternate, as where every fourth layer has an indexer, a run is one of equal groups of layers.
Two neighbors of a run are compared node by node; the second is then copied for each that was left out. The graph that
results is byte for byte the one that a trace of all layers gives (tests compare them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from seekforge.common.errors import ProgramError
from seekforge.exporter.program.canonical_names import BEFORE, renumber, segments, sort_nodes
from seekforge.formats.checkpoint.model_config import LayerKind, ModelConfig
from seekforge.formats.program import layer_of

#: Neighboring layers that are traced and copied as one.
Group = tuple[int, ...]
#: More layers than kinds alternate over in any model.
_LONGEST_GROUP = 16


def groups_to_trace(config: ModelConfig, layer_range: tuple[int, int]) -> tuple[Group, ...]:
    """Return the layers of [a, b) that must be traced, in groups of a run; the others are copies of those."""
    start, stop = layer_range
    kinds = [config.layer_kind(layer) for layer in range(start, stop)]
    traced: list[Group] = []
    first = 0
    while first < len(kinds):
        size, count = _run(kinds, first)
        groups = [tuple(range(start + first + i * size, start + first + (i + 1) * size)) for i in range(count)]
        kept = groups[: 3 if first == 0 else 2]
        first += size * count
        if first == len(kinds) and len(kept) < count:
            kept.append(groups[-1])
        traced += kept
    return tuple(traced)


def _run(kinds: Sequence[LayerKind], first: int) -> tuple[int, int]:
    """Return (layers of a group, groups) of the longest run that begins at `first`."""
    best = (1, 1)
    for size in range(1, min(_LONGEST_GROUP, len(kinds) - first) + 1):
        count = 1
        while kinds[first + count * size : first + (count + 1) * size] == kinds[first : first + size]:
            count += 1
        if (count > 1 or size == 1) and size * count > best[0] * best[1]:
            best = (size, count)
    return best


def stamp(
    model: onnx.ModelProto,
    traced: Sequence[Group],
    layers: Sequence[int],
    *,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Return the graph of all `layers` from a graph of the `traced` ones.

    Args:
        model: graph without functions.
        traced: the groups of layers in it, ascending, under their own numbers.
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


def _gaps(traced: Sequence[Group], layers: Sequence[int]) -> dict[int, list[int]]:
    """Return the index of a traced group -> the copies to stamp behind it, each by the distance of its layers."""
    gaps: dict[int, list[int]] = {}
    group_of = {layer: number for number, group in enumerate(traced) for layer in group}
    last = None
    for layer in layers:
        if layer in group_of:
            last = group_of[layer]
            continue
        assert last is not None, "the first layer is always traced"
        distance = layer - traced[last][0]
        if distance % len(traced[last]) == 0:
            gaps.setdefault(last, []).append(distance)
    return gaps


class _Writer:
    """Copies the nodes of template groups into the gaps. A segment is the index of a group."""

    def __init__(self, graph: onnx.GraphProto, traced: Sequence[Group]) -> None:
        self._graph, self._traced = graph, traced
        group_of = {layer: number for number, group in enumerate(traced) for layer in group}
        self._segments = [group_of.get(segment, segment) for segment in segments(graph)]
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
                counterpart = self._match(segment - 1, segment)
                names: dict[str, str] = {}
                for distance in gaps[segment]:
                    nodes, names = self._stamp(segment, distance, counterpart, names)
                    result += nodes
                copied[segment] = names
        return result

    def _match(self, first: int, second: int) -> dict[str, str]:
        """Compare two groups node by node; return value of `first` -> the same value of `second`."""
        first_nodes, second_nodes = self._nodes[first], self._nodes[second]
        if len(first_nodes) != len(second_nodes):
            raise ProgramError(
                f"stamp: layers {self._words(first)} have {len(first_nodes)} nodes, layers {self._words(second)} "
                f"{len(second_nodes)}"
            )
        counterpart: dict[str, str] = {}
        for a, b in zip(first_nodes, second_nodes, strict=True):
            if _signature(a) != _signature(b):
                raise ProgramError(
                    f"stamp: layers {self._words(first)} and {self._words(second)} differ in {a.name!r} and {b.name!r}"
                )
            for x, y in zip(a.input, b.input, strict=True):
                if not self._same(x, y, first, second, counterpart):
                    raise ProgramError(
                        f"stamp: {a.op_type} reads {x!r} in layers {self._words(first)}, {y!r} in {self._words(second)}"
                    )
            counterpart.update(zip(a.output, b.output, strict=True))
        return counterpart

    def _same(self, x: str, y: str, first: int, second: int, counterpart: Mapping[str, str]) -> bool:
        where = self._segment_of.get(x, BEFORE)
        if where == first:
            return counterpart[x] == y
        if where != BEFORE:  # from the layer before: what it is called there is its own affair
            return where < first and self._segment_of.get(y) == first
        if layer_of(x) not in self._traced[first]:
            return x == y
        return _moved(x, self._traced[second][0] - self._traced[first][0]) == y

    def _words(self, group: int) -> str:
        return "-".join(map(str, dict.fromkeys((self._traced[group][0], self._traced[group][-1]))))

    def _stamp(
        self, template: int, distance: int, counterpart: Mapping[str, str], before: Mapping[str, str]
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Copy `template`.

        Args:
            template: a traced group; its neighbor before is its equal.
            distance: how many layers behind it the copy is.
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
            return _moved(name, distance) if layer_of(name) in self._traced[template] else name

        for original in self._nodes[template]:
            node = _copy(original)
            node.name = f"{original.name}@{distance}"
            node.input[:] = [read(name) if name else "" for name in original.input]
            for i, name in enumerate(original.output):
                output = self._graph_outputs.get(name)
                names[name] = f"{name}@{distance}" if output is None else _moved(name, distance)
                node.output[i] = names[name]
                if output is not None:
                    self.outputs.append(_named(output, names[name]))
                elif name in self._info:
                    self.infos.append(_named(self._info[name], names[name]))
            nodes.append(node)
        return nodes, names


def _moved(name: str, distance: int) -> str:
    """Return an input's or output's name for the layer so many behind; names outside layers stay."""
    layer = layer_of(name)
    return name if layer is None else renumber(name, layer + distance)


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
