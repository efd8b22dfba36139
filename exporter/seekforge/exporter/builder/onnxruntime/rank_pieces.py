"""Cut a graph into the pieces that a rank of a CPU engine runs one after the other.

ONNX Runtime has no operator that adds up over processes, so a graph ends where it would stand: `SumRanks` becomes an
output of one piece and an input of the next. Everything else that a later piece reads is handed over as it is. Within
a piece are the fused nodes and the library's operators of an engine of one rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx
from onnx import helper

from seekforge.common.errors import ProgramError
from seekforge.exporter.builder.onnxruntime.graphs import finish_graph
from seekforge.exporter.program.inline import drop_unused
from seekforge.exporter.program.stages import cut
from seekforge.exporter.program.taps import TAP_NAME
from seekforge.formats.engine.ranks import LOCAL, PARTIAL, sum_name
from seekforge.formats.program import Program
from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.sum_ranks.spec import SPEC as SUM_RANKS


def stage_graphs(program: Program, graph: str, model: onnx.ModelProto) -> list[onnx.ModelProto | None]:
    """Return what each pipeline stage runs of a canonical graph; None: nothing.

    Args:
        program: says how ranks share the model.
        graph: the name of the graph; all but the main one belong to the last stage.
        model: the graph.

    Raises:
        ProgramError: the type of a value that must be handed over is not known.
    """
    last = program.parallelism.pp - 1
    if graph != "model":
        return [None] * last + [model]
    return [*cut(model, program.pipeline_stages)] if last else [model]


def cut_at_sums(folded: onnx.ModelProto) -> list[onnx.ModelProto]:
    """Finish a folded graph, and return the graphs between its sums over ranks, in order.

    Sums stay until everything else is fused: what is around them is found by its structure.

    Raises:
        ProgramError: the type of a value that must be handed over is not known.
    """
    finished = finish_graph(folded, keeps=(SUM_RANKS.name,))
    _copy_outputs(finished.graph)
    model = onnx.shape_inference.infer_shapes(finished)
    graph = model.graph
    renamed: dict[str, str] = {}  # values that pieces hand on, as they are called outside
    for number, node in enumerate(filter(_is_sum, graph.node)):
        partial = f"{PARTIAL}{number}"
        renamed |= {node.input[0]: partial, node.output[0]: sum_name(partial)}
    groups = _between_sums(graph.node)
    made = {name: number for number, nodes in enumerate(groups) for node in nodes for name in node.output}
    outputs = {value.name for value in graph.output}
    reads = [{name for node in nodes for name in _reads(node)} for nodes in groups]
    for number, names in enumerate(reads):
        for name in sorted(names):
            if made.get(name, number) < number:
                if renamed.get(name, "").startswith(PARTIAL):
                    raise ProgramError(f"ranks: {name!r} is read behind the sum of which it is a part; export again")
                renamed.setdefault(name, f"{LOCAL}{len(renamed)}")
    infos = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    place = {name: number for number, name in enumerate((*infos, *constants))}.__getitem__
    last_read = {name: number for number, names in enumerate(reads) for name in names}
    empty = onnx.ModelProto()
    empty.CopyFrom(model)
    for field in ("node", "input", "output", "initializer", "value_info"):
        empty.graph.ClearField(field)
    pieces = []
    for number, nodes in enumerate(groups):
        piece = onnx.ModelProto()
        piece.CopyFrom(empty)
        for node in nodes:
            copy = piece.graph.node.add()
            copy.CopyFrom(node)
            _rename(copy, renamed)
        results = {name: None for node in nodes for name in node.output}  # a set in order
        from_others = reads[number] - results.keys()
        arrives = sorted((from_others & infos.keys()) - constants.keys(), key=place)
        untyped = sorted((from_others & renamed.keys()) - infos.keys())
        if untyped:
            raise ProgramError(f"ranks: the type of {untyped[0]!r} between two pieces is not known; export again")
        leaves = [
            name
            for name in results
            if name in outputs or renamed.get(name, "").startswith(PARTIAL) or last_read.get(name, number) > number
        ]
        inside = sorted((results.keys() & infos.keys()) - set(leaves), key=place)
        piece.graph.input.extend(_value(name, infos, renamed) for name in arrives)
        piece.graph.output.extend(_value(name, infos, renamed) for name in _in_order(leaves, graph))
        piece.graph.initializer.extend(constants[name] for name in sorted(reads[number] & constants.keys(), key=place))
        piece.graph.value_info.extend(infos[name] for name in inside)
        drop_unused(piece)
        pieces.append(piece)
    return pieces


def _is_sum(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == SUM_RANKS.name


def _between_sums(nodes: Iterable[onnx.NodeProto]) -> list[list[onnx.NodeProto]]:
    """Return the nodes up to each sum, without it, and those behind the last one."""
    groups: list[list[onnx.NodeProto]] = [[]]
    for node in nodes:
        if _is_sum(node):
            groups.append([])
        else:
            groups[-1].append(node)
    return groups


def _copy_outputs(graph: onnx.GraphProto) -> None:
    """Let outputs and taps that pieces also hand on, or that are added up or sums, be copies of what is handed on, in
    place.

    What is handed on has a name of its own, by which pieces give it to each other; the copy keeps the graph's. That of
    a tap nobody reads until `parity` asks for it: ONNX Runtime drops it.
    """
    outputs = {value.name for value in graph.output}
    types = {value.name: value for value in (*graph.value_info, *graph.output)}
    groups = _between_sums(graph.node)
    made = {name: number for number, nodes in enumerate(groups) for node in nodes for name in node.output}
    handed = {name for node in graph.node if _is_sum(node) for name in (*node.input, *node.output)}
    for number, nodes in enumerate(groups):
        handed |= {name for node in nodes for name in _reads(node) if made.get(name, number) < number}
    inner = {name: f"{name}/handed" for name in sorted(handed) if name in outputs or TAP_NAME.fullmatch(name)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        copies = [name for name in node.output if name in inner]
        _rename(node, inner)
        nodes.append(node)
        nodes += [helper.make_node("Identity", [inner[name]], [name], f"{name}/Identity") for name in copies]
    for name, called in inner.items():
        if name in types:
            value = graph.value_info.add()
            value.CopyFrom(types[name])
            value.name = called
    ordered = onnx.GraphProto(node=nodes)
    del graph.node[:]
    graph.node.extend(ordered.node)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the values that a node reads, those of graphs inside it included."""
    yield from node.input
    for graph in _inner(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (value.name for value in graph.output)


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Give values of a node other names, also in graphs inside it."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for graph in _inner(node):
        for inner in graph.node:
            _rename(inner, names)
        for value in graph.output:
            value.name = names.get(value.name, value.name)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def _in_order(names: Sequence[str], graph: onnx.GraphProto) -> list[str]:
    """Return outputs of the graph in its order, and others behind them."""
    order = {value.name: number for number, value in enumerate(graph.output)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _value(name: str, infos: dict[str, onnx.ValueInfoProto], renamed: dict[str, str]) -> onnx.ValueInfoProto:
    if name not in infos:
        raise ProgramError(f"ranks: the type of {name!r} between two pieces is not known; export the program again")
    value = onnx.ValueInfoProto()
    value.CopyFrom(infos[name])
    value.name = renamed.get(name, name)
    return value
