"""Cut a graph between layers into stages that hand values on, so that each becomes a plan of its own.

A stage is what a layer range exported alone would be, but nothing is rounded in between: whatever the later layers
read of the earlier ones is handed over as it is. Values that belong to no layer (clamped positions, RoPE rows) are
computed again in every stage that reads them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import onnx

from seekforge.exporter.rewrite.names import AFTER, BEFORE, segments
from seekforge.plugins.errors import ProgramError

#: Start of the names of values that stages hand on.
HANDOVER = "handover"


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
    where = segments(model.graph)
    starts = [start for start, _ in ranges]
    stage_of = {
        name: -1 if segment == BEFORE else _stage(segment, starts)
        for node, segment in zip(model.graph.node, where, strict=True)
        for name in node.output
    }
    needed = [_needed(model.graph, stage, stage_of) for stage in range(len(ranges))]
    handed = _handed_over(model.graph, stage_of)
    return [_extract(model, needed[stage], stage, stage_of, handed) for stage in range(len(ranges))]


def _stage(segment: int, starts: Sequence[int]) -> int:
    if segment == AFTER:
        return len(starts) - 1
    return max(i for i, start in enumerate(starts) if start <= segment)


def _needed(graph: onnx.GraphProto, stage: int, stage_of: dict[str, int]) -> list[onnx.NodeProto]:
    """Return the nodes of a stage, with those outside layers that they read, in order."""
    wanted = {name for name, where in stage_of.items() if where == stage}
    kept = []
    for node in reversed(graph.node):
        mine = stage_of.get(node.output[0])
        if any(name in wanted for name in node.output) and mine in (stage, -1):
            kept.append(node)
            wanted |= {name for name in node.input if stage_of.get(name) == -1}
    return kept[::-1]


def _handed_over(graph: onnx.GraphProto, stage_of: dict[str, int]) -> dict[str, str]:
    """Return the values that a later stage than their own reads, in order -> their number."""
    found: dict[str, str] = {}
    for node in graph.node:
        reader = stage_of[node.output[0]]
        for name in node.input:
            if 0 <= stage_of.get(name, -1) < reader:
                found.setdefault(name, str(len(found)))
    return found


def _extract(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    stage: int,
    stage_of: dict[str, int],
    handed: dict[str, str],
) -> onnx.ModelProto:
    graph = model.graph
    infos = {value.name: value for value in (*graph.value_info, *graph.output)}
    leaves = {name: f"{HANDOVER}_out.{number}" for name, number in handed.items() if stage_of[name] == stage}
    arrives = {name: f"{HANDOVER}.{number}" for name, number in handed.items() if stage_of[name] < stage}
    renamed = arrives | leaves
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for field in ("node", "input", "output", "initializer", "value_info"):
        result.graph.ClearField(field)

    def face(name: str) -> onnx.ValueInfoProto:
        if name not in infos:
            raise ProgramError(
                f"stages: the type of {name!r} between two layers is not known; export the program again"
            )
        value = onnx.ValueInfoProto()
        value.CopyFrom(infos[name])
        value.name = renamed[name]
        return value

    for node in nodes:
        copy = result.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        copy.output[:] = [renamed.get(name, name) for name in node.output]
    read = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    result.graph.input.extend(value for value in graph.input if value.name in read)
    result.graph.input.extend(face(name) for name in arrives if name in read)
    result.graph.output.extend(value for value in graph.output if value.name in made)
    result.graph.output.extend(face(name) for name in leaves)
    result.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    result.graph.value_info.extend(value for value in graph.value_info if value.name in made - renamed.keys())
    return result
