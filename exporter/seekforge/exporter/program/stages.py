"""Cut a graph between layers into stages that hand values on, so that each becomes a plan of its own.

A stage is what a layer range exported alone would be, but nothing is rounded in between: whatever the later layers
read of the earlier ones is handed over as it is. Values that belong to no layer (clamped positions, RoPE rows) are
computed again in every stage that reads them, and so are casts of what is handed over. What a layer's first norm adds
up goes from layer to layer as one value where it has the type of activations, else as the two values that are added:
they are no more bytes, and a build can make one operator of sum and norm. Values lie in numbered places, and a place is
used again when its value has been read for the last time: a chain of layers needs two of each, however long it is.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

import onnx

from seekforge.common.dtypes import FROM_ONNX, itemsize
from seekforge.common.errors import ProgramError
from seekforge.exporter.program.canonical_names import AFTER, BEFORE, segments

#: Start of the names of values that stages hand on.
INTERMEDIATE = "intermediate"


def stage_ranges(layer_range: tuple[int, int], layers_per_stage: int) -> list[tuple[int, int]]:
    """Return the half-open layer ranges of the stages, as even as they can be, none longer than asked."""
    first, last = layer_range
    count = -(-(last - first) // layers_per_stage)
    borders = [first + (last - first) * i // count for i in range(count + 1)]
    return list(itertools.pairwise(borders))


def cut(model: onnx.ModelProto, ranges: Sequence[tuple[int, int]]) -> list[onnx.ModelProto]:
    """Return one graph per range of layers; what lies behind the last layer goes with the last range.

    Args:
        model: graph whose nodes are in the order of layers, with types of the values between them.
        ranges: half-open, adjacent, ascending; together all layers of the graph.

    Raises:
        ProgramError: the type of a value that must be handed over is not known.
    """
    whole = _Whole(model, [start for start, _ in ranges])
    return [whole.stage(number) for number in range(len(ranges))]


def _with_sums(graph: onnx.GraphProto, where: Sequence[int]) -> list[int]:
    """Put what a layer's first norm adds up, two values cast to f32, into the segment of the norm."""
    result = list(where)
    number = {name: i for i, node in enumerate(graph.node) for name in node.output}
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(graph.node):
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(i)
    for i, node in enumerate(graph.node):
        total = number.get(node.input[0]) if node.op_type == "RMSNormalization" else None
        if total is None or where[i] in (BEFORE, AFTER) or where[total] >= where[i]:
            continue
        adds = graph.node[total]
        casts = [number.get(name) for name in adds.input]
        others = [one for one in readers[adds.output[0]] if one != i]
        if adds.op_type == "Add" and all(
            one is not None and graph.node[one].op_type == "Cast" for one in (*casts, *others)
        ):
            alone = [one for one in casts if one is not None and readers[graph.node[one].output[0]] == [total]]
            for one in (total, *alone, *others):
                result[one] = where[i]
    for i, node in enumerate(graph.node):
        result[i] = max((result[i], *(result[number[name]] for name in node.input if name in number)))
    return result


class _Whole:
    """The graph, looked through once: what each stage has, reads and hands on."""

    def __init__(self, model: onnx.ModelProto, starts: Sequence[int]) -> None:
        graph = model.graph
        self._model = model
        self._infos = {value.name: value for value in (*graph.value_info, *graph.output)}
        self._inputs = {value.name: value for value in graph.input}
        self._outputs = {value.name: value for value in graph.output}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._outside: list[onnx.NodeProto] = []  # nodes of no layer, which go wherever they are read
        self._nodes: list[list[onnx.NodeProto]] = [[] for _ in starts]
        self._stage_of: dict[str, int] = {}
        self._casts: dict[str, onnx.NodeProto] = {}
        for node, segment in zip(graph.node, _with_sums(graph, segments(graph)), strict=True):
            if segment == BEFORE:
                self._outside.append(node)
                continue
            stage = len(starts) - 1 if segment == AFTER else bisect.bisect_right(starts, segment) - 1
            self._nodes[stage].append(node)
            self._stage_of.update((name, stage) for name in node.output)
            if node.op_type == "Cast" and node.input[0] in self._stage_of:
                self._casts[node.output[0]] = node
        self._last = self._last_readers()
        self._handed = self._places()

    def stage(self, number: int) -> onnx.ModelProto:
        """Return one stage as a graph of its own."""
        produced = {name for node in self._nodes[number] for name in node.output}
        nodes = self._with_outside([*self._recast(number), *self._nodes[number]])
        read = {name for node in nodes for name in node.input}
        made = [name for node in nodes for name in node.output]
        arrives = [n for n in self._handed if self._stage_of[n] < number and n in read]
        leaves = [n for n in self._handed if self._stage_of[n] == number]
        renamed = {name: f"{INTERMEDIATE}.{self._handed[name]}" for name in arrives}
        renamed |= {name: f"{INTERMEDIATE}_out.{self._handed[name]}" for name in leaves}
        graph = onnx.GraphProto(name=self._model.graph.name)
        shown = [name for name in leaves if name in self._outputs]  # such as the keys that a later layer takes too
        copies = {name: renamed.pop(name) for name in shown}
        for node in nodes:
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [renamed.get(name, name) for name in node.input]
            copy.output[:] = [renamed.get(name, name) for name in node.output]
        for name, copied in copies.items():
            graph.node.append(onnx.helper.make_node("Identity", [name], [copied], f"{copied}/Identity"))
        renamed |= copies
        graph.input.extend(value for name, value in self._inputs.items() if name in read)
        graph.input.extend(self._value(name, renamed[name]) for name in arrives)
        results = produced.intersection(self._outputs)
        graph.output.extend(value for name, value in self._outputs.items() if name in results)
        graph.output.extend(self._value(name, renamed[name]) for name in leaves)
        graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in read)
        inner = [name for name in made if name not in renamed and name not in results]  # others are inputs, outputs
        graph.value_info.extend(self._infos[name] for name in inner if name in self._infos)
        model = self._model
        return onnx.ModelProto(
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
            opset_import=model.opset_import,
            functions=model.functions,
            metadata_props=model.metadata_props,
            graph=graph,
        )

    def _with_outside(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Return nodes behind those outside layers that they read."""
        wanted = {name for node in nodes for name in node.input}
        chain = []
        for node in reversed(self._outside):
            if not wanted.isdisjoint(node.output):
                chain.append(node)
                wanted.update(node.input)
        return [*reversed(chain), *nodes]

    def _recast(self, number: int) -> list[onnx.NodeProto]:
        """Return the casts that lead from what is handed over to what a stage reads, in order."""
        result: dict[str, onnx.NodeProto] = {}
        for name in self._foreign(number):
            chain, _ = self._source(name)
            result.update((node.output[0], node) for node in chain)
        return list(result.values())

    def _foreign(self, number: int) -> list[str]:
        """Return the values of earlier stages that a stage reads, in the order of reading."""
        read = (name for node in self._nodes[number] for name in node.input)
        return list(dict.fromkeys(name for name in read if self._stage_of.get(name, number) < number))

    def _source(self, name: str) -> tuple[list[onnx.NodeProto], str]:
        """Return the casts that lead to a value, first to last, and what they begin with, if that is no wider."""
        chain: list[onnx.NodeProto] = []
        source = name
        while source in self._casts:
            chain.append(self._casts[source])
            source = chain[-1].input[0]
        if not chain or self._width(source) > self._width(name):
            return [], name
        return chain[::-1], source

    def _width(self, name: str) -> float:
        """Bytes of an element; a value of unknown type is refused only if it must be handed over."""
        if name not in self._infos:
            return math.inf
        return itemsize(FROM_ONNX[self._infos[name].type.tensor_type.elem_type])

    def _last_readers(self) -> dict[str, int]:
        """Return the values that are handed over -> the last stage that reads them."""
        last: dict[str, int] = {}
        for number in range(len(self._nodes)):
            last.update((self._source(name)[1], number) for name in self._foreign(number))
        return last

    def _places(self) -> dict[str, str]:
        """Return each value that is handed on -> the number of its place.

        It has its place from the stage that makes it to the last one that reads it, both included; one place holds
        values of one type.
        """
        places: list[tuple[int, bytes]] = []  # the stage in which each is read last, and its type
        result: dict[str, str] = {}
        for name in sorted(self._last, key=self._stage_of.__getitem__):  # within a stage in the order of reading
            made = self._stage_of[name]
            kind = self._infos[name].type.SerializeToString(deterministic=True) if name in self._infos else b""
            free = (i for i, (busy, of) in enumerate(places) if busy < made and of == kind)
            number = next(free, len(places))
            places[number : number + 1] = [(self._last[name], kind)]
            result[name] = str(number)
        return result

    def _value(self, name: str, called: str) -> onnx.ValueInfoProto:
        if name not in self._infos:
            raise ProgramError(
                f"stages: the type of {name!r} between two layers is not known; export the program again"
            )
        value = onnx.ValueInfoProto()
        value.CopyFrom(self._infos[name])
        value.name = called
        return value
