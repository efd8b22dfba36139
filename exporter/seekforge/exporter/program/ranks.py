"""How a model is shared by several ranks: what must divide, what each loads, and the proof without GPUs.

Attention, dense MLPs and shared experts are split among all tp · ep ranks; routed experts are dealt out to ep groups
and split among the tp ranks of a group; embedding, head, router, indexer, norms and caches are whole on every rank.
All ranks run one graph: what differs is in the bindings, and in the input `expert_map`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from seekforge.common.errors import ConfigError, ProgramError
from seekforge.formats.checkpoint.model_config import FP8_BLOCK, ModelConfig
from seekforge.formats.weight_recipes import Ranks
from seekforge.plugins.sum_ranks.spec import SPEC as SUM_RANKS


def check_ranks(config: ModelConfig, ranks: Ranks) -> None:
    """Compare a number of ranks with the sizes of the model.

    Raises:
        ConfigError: something does not divide; FP8 matrices are only cut between their 128x128 blocks.
    """
    if ranks.tp < 1 or ranks.ep < 1:
        raise ConfigError(f"--tp is {ranks.tp} and --ep is {ranks.ep}, expected 1 or more")
    fault = _fault(config, ranks)
    if fault:
        raise ConfigError(f"--tp {ranks.tp} --ep {ranks.ep}: {fault}; {_remedy(config, ranks)}")


def _fault(config: ModelConfig, ranks: Ranks) -> str:
    """Return what does not divide, or nothing. Where there is one part, nothing is cut."""
    count = ranks.count
    shared = config.n_shared_experts * config.moe_intermediate_size
    blocks = f"rows in whole blocks of {FP8_BLOCK}"
    heads = config.num_attention_heads
    rules = (
        (heads, count, 1, "num_attention_heads", "heads"),
        (heads * config.qk_head_dim, count, FP8_BLOCK, "num_attention_heads * (nope + rope)", blocks),
        (heads * config.v_head_dim, count, FP8_BLOCK, "num_attention_heads * v_head_dim", blocks),
        (config.intermediate_size, count, FP8_BLOCK, "intermediate_size", blocks),
        (shared, count, FP8_BLOCK, "n_shared_experts * moe_intermediate_size", blocks),
        (config.moe_intermediate_size, ranks.tp, FP8_BLOCK, "moe_intermediate_size", blocks),
        (config.n_routed_experts, ranks.ep, 1, "n_routed_experts", "experts"),
    )
    for size, parts, unit, name, what in rules:
        if parts > 1 and size % (parts * unit):
            return f"{name} is {size}, expected equal {what} for {parts} ranks"
    return ""


def _remedy(config: ModelConfig, ranks: Ranks) -> str:
    """Say how many ranks, at most as many as were asked for, can share the model."""
    bound = min(ranks.count, config.num_attention_heads)
    counts = (
        Ranks(count // ep, ep)
        for count in range(bound, 1, -1)
        for ep in sorted(range(1, count + 1), key=lambda ep: abs(ep - ranks.ep))
        if count % ep == 0
    )
    fitting = next((one for one in counts if not _fault(config, one)), None)
    if fitting is None:
        return "this model runs on one rank only: leave out --tp and --ep"
    return f"pass --tp {fitting.tp} --ep {fitting.ep}, the most ranks up to that which can share it"


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
    own = set(shared)

    def name(old: str) -> str:
        return old if not old or old in own else prefix + old

    for node in result.node:
        node.name = prefix + node.name
        node.input[:] = map(name, node.input)
        node.output[:] = map(name, node.output)
    for value in (*result.input, *result.output, *result.initializer):
        value.name = name(value.name)
    return result
