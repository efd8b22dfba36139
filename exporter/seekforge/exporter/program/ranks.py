"""What all ranks compute together, as one graph: the proof without GPUs that a model is shared out right.

The tensor-parallel ranks of a stage run one graph. What differs is in the bindings, and in the input `expert_map`
(`rank_bindings`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from seekforge.common.errors import ProgramError
from seekforge.plugins.sum_ranks.spec import SPEC as SUM_RANKS


def merge(graphs: Sequence[onnx.ModelProto], shared: Sequence[str]) -> onnx.ModelProto:
    """Join the graphs of all ranks into one, in which each `SumRanks` is a Sum over them.

    What it computes is what the ranks compute together, so comparing it with the whole model proves how weights are
    cut and where sums stand.

    Args:
        graphs: one per rank: the same nodes, each with its own weights as initializers or inputs.
        shared: inputs that all ranks are given alike. The others get the prefix `rank{r}.`, as do outputs.

    Raises:
        ProgramError: the graphs differ, or have no collective.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graphs[0])
    graph = result.graph
    for field in ("node", "input", "output", "initializer", "value_info"):
        graph.ClearField(field)
    pieces = []
    for rank, model in enumerate(graphs):
        renamed = _prefixed(model.graph, f"rank{rank}.", shared)
        keep = {value.name for value in graph.input}
        graph.input.extend(value for value in renamed.input if value.name not in keep)
        graph.output.extend(renamed.output)
        graph.initializer.extend(renamed.initializer)
        pieces.append(list(_between_sums(renamed.node)))
    lengths = {len(parts) for parts in pieces}
    if lengths == {1} or len(lengths) != 1:
        counts = sorted(length - 1 for length in lengths)
        raise ProgramError(f"merge: ranks have {counts} collectives, expected the same number, at least one")
    for parts in zip(*pieces, strict=True):
        sums = []
        for nodes, collective in parts:
            graph.node.extend(nodes)
            if collective is not None:
                sums.append(collective)
        if sums:
            total = f"{sums[0].name}.sum"
            graph.node.append(onnx.helper.make_node("Sum", [node.input[0] for node in sums], [total], name=total))
            for node in sums:
                graph.node.append(onnx.helper.make_node("Identity", [total], list(node.output), name=node.name))
    return result


def _between_sums(
    nodes: Sequence[onnx.NodeProto],
) -> Iterator[tuple[list[onnx.NodeProto], onnx.NodeProto | None]]:
    """Yield (nodes up to a collective, the collective); the last has none."""
    before: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type == SUM_RANKS.name:
            yield before, node
            before = []
        else:
            before.append(node)
    yield before, None


def _prefixed(graph: onnx.GraphProto, prefix: str, shared: Sequence[str]) -> onnx.GraphProto:
    """Return a copy whose names have a prefix, those of shared inputs excepted."""
    result = onnx.GraphProto()
    result.CopyFrom(graph)
    kept = set(shared)

    def name(old: str) -> str:
        return old if not old or old in kept else prefix + old

    for node in result.node:
        node.name = prefix + node.name
        node.input[:] = map(name, node.input)
        node.output[:] = map(name, node.output)
    for value in (*result.input, *result.output, *result.initializer):
        value.name = name(value.name)
    return result
