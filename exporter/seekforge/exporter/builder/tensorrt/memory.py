"""What one GPU is expected to hold of an engine, and what would fit where that is more than there is."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seekforge.common.dtypes import itemsize
from seekforge.exporter.builder.tensorrt.passes.nvfp4_experts import expert_weights
from seekforge.exporter.builder.tensorrt.profiles import largest_step, spanning
from seekforge.exporter.models import family_of
from seekforge.exporter.program.rank_bindings import stage_reads
from seekforge.exporter.sizing.memory import (
    GIB,
    Workload,
    activation_bytes,
    cache_bytes_per_token,
    operator_scratch_bytes,
    reserve_bytes,
    selection_bytes,
    usable_bytes,
)
from seekforge.exporter.sizing.scratch import Kernels
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import Limits
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.program import Program, Role, layer_of
from seekforge.formats.quantization.nvfp4 import row_bytes
from seekforge.formats.targets import TargetConfig
from seekforge.formats.weight_recipes import Recipe
from seekforge.plugins.operator import cdiv
from seekforge.plugins.registry import WITH_KERNELS

if TYPE_CHECKING:
    from seekforge.exporter.builder.tensorrt.check import Inputs

#: The layer that a weight belongs to, in its name.
_LAYER = re.compile(r"layers\.(\d+)\.")


def expected_bytes(
    inputs: Inputs,
    target: TargetConfig,
    limits: Limits,
    plan_layers: int | None,
    plugins: Collection[str] = WITH_KERNELS,
) -> dict[str, int]:
    """Return what one GPU is expected to hold, with one sequence of the longest context, and what it has; of several
    GPUs the fullest. Arguments as of `stage_bytes`."""
    return fullest(stage_bytes(inputs, target, limits, plan_layers, plugins))


def fullest(stages: Sequence[dict[str, int]]) -> dict[str, int]:
    """Return the account of the GPU with the most in it."""
    return max(stages, key=lambda account: account["total"])


def stage_bytes(
    inputs: Inputs,
    target: TargetConfig,
    limits: Limits,
    plan_layers: int | None,
    plugins: Collection[str] = WITH_KERNELS,
) -> tuple[dict[str, int], ...]:
    """Return what a GPU of each pipeline stage is expected to hold, with one sequence of the longest context, and what
    it has.

    Plans reserve memory for the largest step of each profile, so that is counted, also where no step gets so large.

    Args:
        inputs: the program.
        target, limits: what the engine is built for.
        plan_layers: most layers of one plan, None: all. Each has a place of its own for what it chooses.
        plugins: op_types that run as plugins.
    """
    stages = range(inputs.program.parallelism.pp)
    return tuple(_stage_bytes(inputs, target, limits, plan_layers, plugins, stage) for stage in stages)


def _stage_bytes(
    inputs: Inputs,
    target: TargetConfig,
    limits: Limits,
    plan_layers: int | None,
    plugins: Collection[str],
    stage: int,
) -> dict[str, int]:
    assert target.gpu is not None
    config = inputs.config
    first, last = inputs.program.pipeline_stages[stage]
    more_layers = min(plan_layers or last - first, last - first) - 1
    steps = [largest_step(profile, limits) for profile in spanning(target.profiles, limits).values()]
    tokens = max(batch * queries for batch, queries in steps)
    widest = Workload(max(limits.max_model_len, tokens), limits.max_batch_size, tokens)
    parts = {
        "weights": sum(one.num_bytes for one in _held(inputs, plugins, stage, nvfp4_experts=target.nvfp4_experts)),
        "cache": (cdiv(limits.max_model_len, BLOCK_SIZE) + 1)
        * block_bytes(inputs.program, config, target.kv_format, stage),
        "scratch": max(
            operator_scratch_bytes(
                config,
                inputs.program.parallelism,
                Workload(limits.max_model_len, limits.max_batch_size),
                target.kv_format,
                kernels=Kernels(
                    target.sms,
                    inputs.program.numerics["act_quant"],
                    frozenset(inputs.ops.keys() - set(plugins)),
                    target.nvfp4_experts,
                ),
                steps=steps,
            ).values()
        ),
        "activations": activation_bytes(config, inputs.program.parallelism, widest)
        + more_layers * tokens * selection_bytes(config),
        "reserve": reserve_bytes(inputs.program.parallelism),
    }
    return parts | {"total": sum(parts.values()), "usable": usable_bytes(target.gpu.memory_gib)}


@dataclass(frozen=True)
class _Held:
    """A weight or table input of an engine, and the first graph that has it."""

    graph: str
    name: str
    role: Role
    num_bytes: int


def _held(
    inputs: Inputs, plugins: Collection[str], stage: int | None = None, *, nvfp4_experts: bool = False
) -> Iterator[_Held]:
    """Yield what one rank of a pipeline stage holds, or of all stages together."""
    wide = inputs.wide(plugins)
    narrow: set[str] = set()
    if nvfp4_experts:
        narrow = {weight for graph in inputs.graphs.values() for weight, _ in expert_weights(graph)}
    reads = None if stage is None else stage_reads(inputs.program, stage)
    held: dict[str, list[tuple[str, Recipe]]] = {}  # input -> each type and recipe that it has in some graph
    for name, graph in inputs.program.graphs.items():
        for spec in graph.inputs:
            if spec.role not in ("weight", "table") or (reads is not None and not reads(name, spec.name)):
                continue
            one = ("f32" if spec.name in wide[name] else spec.dtype, inputs.bindings[name][spec.name])
            if one not in held.setdefault(spec.name, []):
                held[spec.name].append(one)
                shape = [int(size) for size in spec.shape]
                if spec.name in narrow:
                    shape[-1] = row_bytes(shape[-1])
                size = itemsize(one[0]) * math.prod(shape)
                yield _Held(name, spec.name, spec.role, size)


def layers_that_fit(
    inputs: Inputs,
    num_bytes: int,
    cache_bytes: int,
    plugins: Collection[str] = WITH_KERNELS,
    *,
    nvfp4_experts: bool = False,
) -> int:
    """Return the most consecutive layers of the program whose weights, tables and caches are at most `num_bytes`.

    With the first layer goes the embedding, with the last one the head and the MTP module, which embeds tokens too.

    Args:
        inputs: the program.
        num_bytes: what there is for them.
        cache_bytes: the caches of all layers together, that of the MTP module included.
        plugins: op_types that run as plugins.
        nvfp4_experts: whether experts are in NVFP4.
    """
    start, stop = inputs.program.layer_range
    mtp = len(inputs.program.graphs) - 1
    per_cache = cache_bytes / (stop - start + mtp)
    layers = [per_cache] * (stop - start)
    before = family_of(inputs.config).names_before(inputs.config)
    tables = embedding = behind = 0
    for one in _held(inputs, plugins, nvfp4_experts=nvfp4_experts):
        layer = _LAYER.match(one.name) if one.graph == "model" else None
        if layer is not None:
            layers[int(layer[1]) - start] += one.num_bytes
        elif one.role == "table":
            tables += one.num_bytes
        elif one.name in before:
            embedding += one.num_bytes
        else:
            behind += one.num_bytes
    layers[0] += embedding
    layers[-1] += behind + mtp * (per_cache + embedding)
    most = first = 0
    for last in range(len(layers)):
        while tables + sum(layers[first : last + 1]) > num_bytes and first <= last:
            first += 1
        most = max(most, last + 1 - first)
    return most


def block_bytes(program: Program, config: ModelConfig, kv_format: str, stage: int) -> int:
    """Bytes of one cache block over all layers that a pipeline stage has, of all graphs."""
    reads = stage_reads(program, stage)
    specs = [
        spec for name, graph in program.graphs.items() for spec in graph.with_role("cache") if reads(name, spec.name)
    ]
    layers = sorted({layer for spec in specs if (layer := layer_of(spec.name)) is not None})
    return BLOCK_SIZE * cache_bytes_per_token(config, kv_format, layers=layers)  # pyright: ignore[reportArgumentType]


def memory_refusal(
    inputs: Inputs,
    target: TargetConfig,
    limits: Limits,
    plan_layers: int | None,
    plugins: Collection[str],
    device: Mapping[str, int],
) -> str:
    """Say by how much it does not fit, and the largest number that would."""
    needs = f"needs {device['total'] / GIB:.1f} GiB, {target.name} has {device['usable'] / GIB:.1f} GiB usable"
    low, high = 0, limits.max_model_len // BLOCK_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        tried = limits.model_copy(update={"max_model_len": middle * BLOCK_SIZE})
        sizes = expected_bytes(inputs, target, tried, plan_layers, plugins)
        low, high = (middle, high) if sizes["total"] <= sizes["usable"] else (low, middle - 1)
    allow = "or pass --allow-oversize to build what will not load"
    if low:
        return f"the engine {needs}; pass --max-model-len {low * BLOCK_SIZE} at most, {allow}"
    if inputs.program.parallelism.num_ranks > 1:
        return f"a rank of the engine {needs}; 'seekforge plan' says how many GPUs hold it all, {allow}"
    start, stop = inputs.program.layer_range
    other = device["total"] - device["weights"] - device["cache"]
    left, nvfp4_experts = device["usable"] - other, target.nvfp4_experts
    count = layers_that_fit(inputs, left, device["cache"], plugins, nvfp4_experts=nvfp4_experts)
    remedy = (
        f"at most {count} of its {stop - start} layers fit: export stages with --layers"
        if count
        else "not one layer fits"
    )
    return (
        f"the engine {needs}, of it {device['weights'] / GIB:.1f} GiB of weights; {remedy} "
        f"('seekforge plan' says how many GPUs hold it all), {allow}"
    )
