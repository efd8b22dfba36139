"""Draw a program so that a person can read it: one box per operator, equal layers once, glue left out.

Casts, slices, reshapes and single products are glue: an edge stands for any path through them. Layers that look the
same are one group with a count, as 3 dense and 58 MoE layers are two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx

from seekforge.common.cli.terminal import shown
from seekforge.exporter.program.canonical_names import AFTER, BEFORE, segments
from seekforge.plugins.operator import DOMAIN

Format = Literal["dot", "mermaid"]

#: Standard operators that are worth a box; custom ones always are.
_SHOWN = {"MatMul", "RMSNormalization", "LayerNormalization", "TopK", "Gather", "Sigmoid"}


@dataclass(frozen=True)
class Group:
    """Equal layers, or what stands before and after them.

    Attributes:
        title: such as `layers 3-60 (58 of MoE)`.
        boxes: what each operator is called, in order.
        edges: (from, to) by place in `boxes`; a negative `from` is the box −1 … of the group before, from its end.
    """

    title: str
    boxes: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]


def groups(model: onnx.ModelProto, weights: Collection[str]) -> list[Group]:
    """Return the groups of a program's graph, in order.

    Args:
        model: the graph.
        weights: its inputs that are weights or tables; boxes are named after them.
    """
    graph = model.graph
    where = segments(graph)
    order: list[int] = sorted(set(where))
    boxes: dict[int, list[str]] = {segment: [] for segment in order}
    edges: dict[int, set[tuple[int, int]]] = {segment: set() for segment in order}
    named = {name: name for name in weights}  # value -> the weight that it is, cast or turned
    before = {segment: order[i - 1] if i else segment for i, segment in enumerate(order)}
    reach: dict[str, set[tuple[int, int]]] = {}  # value -> the boxes that it comes from
    for node, segment in zip(graph.node, where, strict=True):
        sources: set[tuple[int, int]] = set().union(*(reach.get(name, set()) for name in node.input))
        if node.domain == DOMAIN or node.op_type in _SHOWN:
            number = len(boxes[segment])
            boxes[segment].append(_label(node, named))
            for source, place in sources:
                if source == segment:
                    edges[segment].add((place, number))
                elif source == before[segment] and segment != BEFORE:
                    edges[segment].add((place - len(boxes[source]), number))
            sources = {(segment, number)}
        elif node.op_type in ("Cast", "Transpose") and node.input[0] in named:
            named[node.output[0]] = named[node.input[0]]
        for name in node.output:
            reach[name] = sources
    return _joined(order, boxes, edges)


def _label(node: onnx.NodeProto, named: Mapping[str, str]) -> str:
    """Return the operator and whose weight it reads, without the layer's number."""
    short = next((named[name] for name in node.input if name in named), "").removesuffix(".weight")
    if short.startswith("layers."):
        short = short.split(".", 2)[2]
    return f"{node.op_type} {short}".strip()


def _joined(order: Sequence[int], boxes: dict[int, list[str]], edges: dict[int, set[tuple[int, int]]]) -> list[Group]:
    result: list[Group] = []
    run: list[int] = []

    def close() -> None:
        if run:
            first, last = run[0], run[-1]
            names = {BEFORE: "step", AFTER: "head"}
            numbers = f"layer {first}" if first == last else f"layers {first}-{last} ({len(run)} alike)"
            result.append(Group(names.get(first, numbers), tuple(boxes[first]), tuple(sorted(edges[first]))))
            run.clear()

    for segment in order:
        if run and not _alike(segment, run[0], boxes, edges):
            close()
        run.append(segment)
    close()
    return [group for group in result if group.boxes]


def _alike(a: int, b: int, boxes: dict[int, list[str]], edges: dict[int, set[tuple[int, int]]]) -> bool:
    """Whether two layers have the same boxes and the same edges between them; where they come from may differ."""
    inside = [{edge for edge in edges[segment] if edge[0] >= 0} for segment in (a, b)]
    return boxes[a] == boxes[b] and inside[0] == inside[1]


def draw(groups: Sequence[Group], how: Format) -> str:
    """Return the groups as DOT (Graphviz) or Mermaid text."""
    return "\n".join(_dot(groups) if how == "dot" else _mermaid(groups)) + "\n"


def _links(groups: Sequence[Group]) -> Iterable[tuple[str, str]]:
    for g, group in enumerate(groups):
        for source, target in group.edges:
            if source >= 0:
                yield f"g{g}n{source}", f"g{g}n{target}"
            elif g:
                yield f"g{g - 1}n{len(groups[g - 1].boxes) + source}", f"g{g}n{target}"


def _quoted(text: str) -> str:
    """Return text for a quoted string of DOT."""
    return shown(text).replace("\\", "\\\\").replace('"', '\\"')


def _entities(text: str) -> str:
    """Return text for a quoted label of Mermaid, which a browser takes as HTML."""
    return "".join(char if char.isalnum() or char in " ._-()," else f"#{ord(char)};" for char in shown(text))


def _dot(groups: Sequence[Group]) -> Iterable[str]:
    yield "digraph program {"
    yield "  rankdir=TB; node [shape=box, fontname=monospace];"
    for g, group in enumerate(groups):
        yield f'  subgraph cluster_{g} {{ label="{_quoted(group.title)}";'
        for n, box in enumerate(group.boxes):
            yield f'    g{g}n{n} [label="{_quoted(box)}"];'
        yield "  }"
    for source, target in _links(groups):
        yield f"  {source} -> {target};"
    yield "}"


def _mermaid(groups: Sequence[Group]) -> Iterable[str]:
    yield "flowchart TB"
    for g, group in enumerate(groups):
        yield f'  subgraph g{g}["{_entities(group.title)}"]'
        for n, box in enumerate(group.boxes):
            yield f'    g{g}n{n}["{_entities(box)}"]'
        yield "  end"
    for source, target in _links(groups):
        yield f"  {source} --> {target}"
