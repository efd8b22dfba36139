"""Optimization profiles: which sizes an engine must take, from its limits. Pure functions over plain values."""

from __future__ import annotations

from collections.abc import Mapping

from seekforge.formats.engine.manifest import Limits
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.program import GraphIO
from seekforge.formats.targets import Profile
from seekforge.plugins.operator import cdiv
from seekforge.plugins.tensorrt.library import MOST_ELEMENTS

Bounds = tuple[int, int, int]


def spanning(profiles: Mapping[str, Profile], limits: Limits) -> dict[str, Profile]:
    """Return the profiles, widened so that together they span the limits, and no wider than a step can be.

    The one of most sequences then takes `max_batch_size`, the one of most new tokens `max_num_batched_tokens`. A plan
    reserves memory for all sequences of a profile at its longest, and no step has more than `max_num_batched_tokens`:
    so the profile of most new tokens is cut to fewer sequences, and others to fewer tokens of each. The one of most
    sequences alone keeps both, since decode steps are padded to its corner.
    """
    widest = max(profiles, key=lambda name: profiles[name].max_batch_size)
    longest = max(profiles, key=lambda name: profiles[name].max_query_len)
    widened = dict(profiles)
    for name, key, needed in (
        (widest, "max_batch_size", limits.max_batch_size),
        (longest, "max_query_len", min(limits.max_num_batched_tokens, limits.max_model_len)),
    ):
        if getattr(widened[name], key) < needed:
            widened[name] = widened[name].model_copy(update={key: needed})
    most = limits.max_num_batched_tokens
    for name, profile in widened.items():
        batch, queries = largest_step(profile, limits)
        if name == widest or batch * queries <= most:
            continue
        cut = {"max_batch_size": most // queries} if name == longest else {"max_query_len": max(most // batch, 1)}
        widened[name] = profile.model_copy(update=cut)
    return widened


def largest_step(profile: Profile, limits: Limits) -> tuple[int, int]:
    """Return the most sequences, and the most new tokens of each, that a profile takes together."""
    queries = min(profile.max_query_len, limits.max_num_batched_tokens, limits.max_model_len)
    return min(profile.max_batch_size, limits.max_batch_size), queries


def axis_bounds(profile: Profile, limits: Limits, *, pool_blocks: int, hands_over: bool = False) -> dict[str, Bounds]:
    """Return symbolic axis -> smallest, typical and largest size.

    Args:
        profile: a profile of the target.
        limits: the limits of the engine, to which the profile is cut.
        pool_blocks: most blocks that the caches may have.
        hands_over: the graph gives hidden states for the next stage instead of logits.
    """
    batch, queries = largest_step(profile, limits)
    table = cdiv(limits.max_model_len, BLOCK_SIZE)
    typical_batch = min(profile.typical_batch_size, batch)
    typical_queries = min(profile.typical_query_len, queries)
    typical_table = min(cdiv(min(profile.typical_context, limits.max_model_len), BLOCK_SIZE), table)
    rows = min(batch * queries, limits.max_num_batched_tokens)  # prompt logits ask for every row
    blocks = min(typical_batch * typical_table + 1, pool_blocks)
    bounds: dict[str, Bounds] = {
        "B": (1, typical_batch, batch),
        "Q": (1, typical_queries, queries),
        "MB": (1, typical_table, table),
        "N": (1, min(typical_batch, rows), rows),
        "NB": (1, blocks, pool_blocks),
        "NS": (BLOCK_SIZE, blocks * BLOCK_SIZE, pool_blocks * BLOCK_SIZE),
    }
    if hands_over:
        del bounds["N"]
    return bounds


def pool_blocks(graph: GraphIO, limits: Limits, cache_budget_bytes: int, bytes_per_block: int) -> int:
    """Return how many cache blocks an engine may be given.

    At most what full sequences need, what memory holds, and what every version of TensorRT counts in a tensor: three
    million tokens of the wider cache in FP8.
    """
    full = limits.max_batch_size * cdiv(limits.max_model_len, BLOCK_SIZE) + 1
    held = max(cache_budget_bytes // bytes_per_block, cdiv(limits.max_model_len, BLOCK_SIZE) + 1)
    widest = max(_elements_per_block(spec.shape) for spec in graph.with_role("cache"))
    return min(full, held, MOST_ELEMENTS // widest)


def _elements_per_block(shape: tuple[int | str, ...]) -> int:
    """Elements of one cache block: [NS, D] counts slots, [NB, …] blocks."""
    elements = BLOCK_SIZE if shape[0] == "NS" else 1
    for size in shape[1:]:
        elements *= int(size)
    return elements


def shapes(graph: GraphIO, bounds: Mapping[str, Bounds]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return input -> smallest, typical and largest shape, for inputs with a symbolic axis."""
    return {
        spec.name: tuple(
            tuple(bounds[size][i] if isinstance(size, str) else size for size in spec.shape) for i in range(3)
        )
        for spec in graph.inputs
        if any(isinstance(size, str) for size in spec.shape)
    }
