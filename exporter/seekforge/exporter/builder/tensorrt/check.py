"""What a GPU build checks before any work: program, checkpoint, precision, limits, operators and memory.

Everything that cannot work is refused here with one sentence that names what would.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from seekforge.common.dtypes import itemsize
from seekforge.common.errors import TargetError
from seekforge.exporter.builder.generation import read_generation
from seekforge.exporter.builder.options import BuildOptions, PluginChoice
from seekforge.exporter.builder.request import (
    check_program,
    check_same_model,
    check_takes,
    fit_limits,
    read_graph,
)
from seekforge.exporter.builder.tensorrt.bf16_linears import bf16_linear_weights
from seekforge.exporter.builder.tensorrt.graph import wide_weights
from seekforge.exporter.builder.tensorrt.profiles import axis_bounds, largest_step, spanning
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.models import family_of
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
from seekforge.formats.engine.manifest import Limits, WeightSource
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.program import Program, Role, load_bindings, load_program
from seekforge.formats.targets import TargetConfig
from seekforge.formats.weight_recipes import Recipe
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.kernels.contracts import refusals
from seekforge.plugins.operator import cdiv, evaluate_dim
from seekforge.plugins.registry import BF16_LINEAR, CACHE_OPS, FP8_OPS, OPERATORS, SPECS, WITH_KERNELS
from seekforge.plugins.tensorrt.library import installed_version, large_tensor_fault

#: The layer that a weight belongs to, in its name.
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class GpuBuild:
    """What will be built for a GPU: the result of all checks, before any work.

    Attributes:
        target: the target as options changed it, with the engine's limits.
        plugins, inlined: op_types that become plugins, and those whose bodies are inlined.
        how: dtypes of the specialization.
        device_bytes: expected use of one GPU.
        oversize: more is expected than there is.
        wide: graph -> weight inputs that the engine holds in f32.
        bf16_linears: graph -> weight inputs whose products are `Bf16Linear` plugins.
    """

    target: TargetConfig
    plugins: tuple[str, ...]
    inlined: tuple[str, ...]
    how: Specialization
    device_bytes: dict[str, int]
    oversize: bool
    wide: dict[str, set[str]]
    bf16_linears: dict[str, set[str]]

    @property
    def limits(self) -> Limits:
        """The limits of the engine."""
        return self.target.limits


@dataclass(frozen=True)
class Inputs:
    """A program and, if given, its checkpoint; checked.

    Attributes:
        graphs: as the program's files have them, without weights.
        read_wide: graph -> BF16 weight inputs that it reads as f32 alone (`prepare.wide_weights`).
        bf16_linears: graph -> those of them that it only multiplies (`bf16_linear_weights`).
    """

    folder: Path
    program: Program
    graphs: dict[str, onnx.ModelProto]
    read_wide: dict[str, set[str]]
    bf16_linears: dict[str, set[str]]
    bindings: dict[str, dict[str, Recipe]]
    config: ModelConfig
    weights: WeightSource

    @property
    def ops(self) -> dict[str, int]:
        """op_type -> nodes of an engine, in the order of the registry: the program's, and one for each bf16 linear."""
        counts = {op: use.num_nodes for op, use in self.program.ops.items()}
        counts[BF16_LINEAR] = sum(map(len, self.bf16_linears.values()))
        return {op: counts[op] for op in SPECS if counts.get(op)}

    def wide(self, plugins: Collection[str]) -> dict[str, set[str]]:
        """Return graph -> weight inputs that an engine with these plugins holds in f32."""
        linears = self.bf16_linears if BF16_LINEAR in plugins else {}
        return {name: wide - linears.get(name, set()) for name, wide in self.read_wide.items()}


def open_inputs(program_folder: Path, checkpoint_folder: Path | None) -> Inputs:
    """Read and check a program and the headers of its checkpoint; no weight bytes.

    Raises:
        ProgramError, CheckpointError, ConfigError: damaged, or they do not belong together.
    """
    program = load_program(program_folder)
    bindings = load_bindings(program_folder)
    check_program(program, bindings, program_folder)
    config = ModelConfig.parse(program.config, str(program_folder / "program.json"))
    read_generation(program_folder, config)
    graphs = {name: read_graph(program_folder, face) for name, face in program.graphs.items()}
    wide = {
        name: wide_weights(graph, [spec.name for spec in program.graphs[name].with_role("weight")])
        for name, graph in graphs.items()
    }
    linears = {name: bf16_linear_weights(graph, wide[name]) for name, graph in graphs.items()}
    nowhere = WeightSource(path=None, index_digest=None)
    inputs = Inputs(program_folder, program, graphs, wide, linears, bindings, config, nowhere)
    if checkpoint_folder is None:
        return inputs
    with open_checkpoint(checkpoint_folder) as opened:
        check_same_model(program, config, opened.config, checkpoint_folder)
        check_takes(bindings, opened.checkpoint, program_folder)
        weights = WeightSource(path=str(checkpoint_folder.resolve()), index_digest=opened.checkpoint.index_digest())
    return replace(inputs, weights=weights)


# --- checks before work -----------------------------------------------------------------------------------------


def check(inputs: Inputs, target: TargetConfig, options: BuildOptions) -> GpuBuild:
    """Decide what will be built, or refuse with one sentence that names what would work.

    Args:
        inputs: the program.
        target: the target as options changed it.
        options: the options of the build.

    Raises:
        TargetError: precision, cache format, limits, operators or memory do not go together.
    """
    program, config, wanted = inputs.program, inputs.config, options.tensorrt.plugins
    limits = fit_limits(target.limits, config, options.named_limits)
    target = target.model_copy(update={"limits": limits})
    ops = tuple(inputs.ops)
    fault = _fault(target, program, config, ops, wanted)
    if fault:
        raise TargetError(f"{fault}; {_remedy(target, program, config, ops, wanted)}")
    plugins = _choose_plugins(config, ops, wanted)
    inlined = tuple(op for op in ops if op not in plugins)
    large = _large_tensor(inputs, target, limits)
    if large:
        raise TargetError(f"target {target.name}: {large}")
    bytes_only = any(OPERATORS[op].inlined_weights == "int8" for op in inlined)
    storage = "float8" if target.has_fp8 and not bytes_only else "int8"
    how = Specialization("bf16", storage, target.kv_format, "trt")
    device = expected_bytes(inputs, target, limits, options.layers_per_plan, plugins)
    oversize = device["total"] > device["usable"]
    if oversize and not options.tensorrt.allow_oversize:
        raise TargetError(_memory_refusal(inputs, target, limits, options.layers_per_plan, plugins, device))
    return GpuBuild(
        target=target,
        plugins=plugins,
        inlined=inlined,
        how=how,
        device_bytes=device,
        oversize=oversize,
        wide=inputs.wide(plugins),
        bf16_linears=inputs.bf16_linears if BF16_LINEAR in plugins else {},
    )


def _fault(
    target: TargetConfig, program: Program, config: ModelConfig, ops: tuple[str, ...], wanted: PluginChoice
) -> str:
    """Return why precision, cache format, operators and the program's roundings do not go together, or nothing."""
    numerics = program.numerics
    if target.precision == "fp8" and numerics["act_quant"] != "ue8m0":
        return (
            f"--precision fp8 multiplies quantized activations, and the program has numerics {numerics['name']!r} "
            "without them"
        )
    if target.kv_format == "fp8_ds" and not (numerics["kv_fp8"] and numerics["indexer_fp8"]):
        return (
            f"--kv-cache-dtype fp8_ds stores FP8, and the program has numerics {numerics['name']!r} without that "
            "rounding"
        )
    plugins = _choose_plugins(config, ops, wanted)
    inlined = [op for op in ops if op not in plugins]
    broken = refusals(config, plugins=plugins, ops=ops)
    if broken:
        return f"target {target.name}: {broken[0]}"
    if target.products == "fp8" and any(op in inlined for op in FP8_OPS):
        names = " and ".join(op for op in FP8_OPS if op in inlined)
        return f"--precision fp8 needs {names} as plugin on sm{target.sm}, inlined it multiplies in BF16"
    if target.kv_format == "fp8_ds" and any(op in inlined for op in CACHE_OPS):
        names = ", ".join(op for op in CACHE_OPS if op in inlined)
        return f"--kv-cache-dtype fp8_ds is read and written by plugins only, and {names} would be inlined"
    return ""


def _large_tensor(inputs: Inputs, target: TargetConfig, limits: Limits) -> str:
    """Return why the installed library cannot take an input or output of a graph at its largest, or nothing.

    Caches are left out: they get no more blocks than it takes.
    """
    assert target.backend != "onnxruntime"
    version = installed_version(target.backend)
    faces = inputs.program.graphs.values()
    specs = [spec for face in faces for spec in (*face.inputs, *face.outputs) if spec.role != "cache"]
    for profile in spanning(target.profiles, limits).values():
        most = {axis: bounds[2] for axis, bounds in axis_bounds(profile, limits, pool_blocks=1).items()}
        for spec in specs:
            shape = [evaluate_dim(size, most) for size in spec.shape]
            fault = large_tensor_fault(target.backend, version, spec.name, shape)
            if fault:
                return fault
    return ""


def _remedy(
    target: TargetConfig, program: Program, config: ModelConfig, ops: tuple[str, ...], wanted: PluginChoice
) -> str:
    """Say which options lead on from a fault: the fewest that do, tried one after the other."""
    changes: list[tuple[str, PluginChoice, TargetConfig]] = []
    choices: tuple[PluginChoice, ...] = (wanted, *(one for one in ("auto", "all") if one != wanted))
    for plugins in choices:
        for precision in dict.fromkeys((target.precision, "bf16")):
            for kv_format in dict.fromkeys((target.kv_format, "bf16")):
                said = [f"--plugins {plugins}"] if plugins != wanted else []
                said += [f"--precision {precision}"] if precision != target.precision else []
                said += [f"--kv-cache-dtype {kv_format}"] if kv_format != target.kv_format else []
                other = target.changed([f"precision={precision}", f"kv_format={kv_format}"])
                changes.append((" ".join(said), plugins, other))
    working = [said for said, plugins, other in changes if not _fault(other, program, config, ops, plugins)]
    numerics = program.numerics
    quantized = numerics["act_quant"] == "ue8m0" and numerics["kv_fp8"] and numerics["indexer_fp8"]
    export = "" if quantized else "export with --numerics fp8, or "
    if not working:
        return "no options build this model for a GPU; --target cpu takes it"
    fewest = min(len(said.split()) for said in working)
    return export + "pass " + " or ".join(said for said in working if len(said.split()) == fewest)


def _choose_plugins(config: ModelConfig, ops: tuple[str, ...], wanted: PluginChoice) -> tuple[str, ...]:
    match wanted:
        case "all":
            return ops
        case "none":
            return ()
        case _:
            return tuple(op for op in ops if not refusals(config, plugins=[op], ops=[op]))


def expected_bytes(
    inputs: Inputs,
    target: TargetConfig,
    limits: Limits,
    plan_layers: int | None,
    plugins: Collection[str] = WITH_KERNELS,
) -> dict[str, int]:
    """Return what one GPU is expected to hold, with one sequence of the longest context, and what it has.

    Plans reserve memory for the largest step of each profile, so that is counted, also where no step gets so large.

    Args:
        inputs, target, limits: of the engine.
        plan_layers: most layers of one plan, None: all. Each has a place of its own for what it chooses.
        plugins: op_types that run as plugins.
    """
    assert target.gpu is not None
    config = inputs.config
    first, last = inputs.program.layer_range
    more_layers = min(plan_layers or last - first, last - first) - 1
    steps = [largest_step(profile, limits) for profile in spanning(target.profiles, limits).values()]
    tokens = max(batch * queries for batch, queries in steps)
    widest = Workload(max(limits.max_model_len, tokens), limits.max_batch_size, tokens)
    found = {
        "weights": weight_input_bytes(inputs, plugins),
        "cache": (cdiv(limits.max_model_len, BLOCK_SIZE) + 1) * block_bytes(inputs.program, config, target.kv_format),
        "scratch": max(
            operator_scratch_bytes(
                config,
                inputs.program.parallelism,
                Workload(limits.max_model_len, limits.max_batch_size),
                target.kv_format,
                kernels=Kernels(target.sms, inputs.program.numerics["act_quant"]),
                steps=steps,
            ).values()
        ),
        "activations": activation_bytes(config, inputs.program.parallelism, widest)
        + more_layers * tokens * selection_bytes(config),
        "reserve": reserve_bytes(inputs.program.parallelism),
    }
    return found | {"total": sum(found.values()), "usable": usable_bytes(target.gpu.memory_gib)}


def weight_input_bytes(inputs: Inputs, plugins: Collection[str] = WITH_KERNELS) -> int:
    """Bytes of all weight and table inputs of an engine; what two graphs make of the same tensors is held once."""
    return sum(one.num_bytes for one in _held(inputs, plugins))


@dataclass(frozen=True)
class _Held:
    """A weight or table input of an engine, and the first graph that has it."""

    graph: str
    name: str
    role: Role
    num_bytes: int


def _held(inputs: Inputs, plugins: Collection[str]) -> Iterator[_Held]:
    wide = inputs.wide(plugins)
    held: dict[str, list[tuple[str, Recipe]]] = {}  # input -> each type and recipe that it has in some graph
    for graph, face in inputs.program.graphs.items():
        for spec in face.inputs:
            if spec.role not in ("weight", "table"):
                continue
            one = ("f32" if spec.name in wide[graph] else spec.dtype, inputs.bindings[graph][spec.name])
            if one not in held.setdefault(spec.name, []):
                held[spec.name].append(one)
                size = itemsize(one[0]) * math.prod(int(size) for size in spec.shape)
                yield _Held(graph, spec.name, spec.role, size)


def layers_that_fit(inputs: Inputs, num_bytes: int, cache_bytes: int, plugins: Collection[str] = WITH_KERNELS) -> int:
    """Return the most consecutive layers of the program whose weights, tables and caches are at most `num_bytes`.

    With the first layer goes the embedding, with the last one the head and the MTP module, which embeds tokens too.

    Args:
        inputs: the program.
        num_bytes: what there is for them.
        cache_bytes: of all layers together, that of the MTP module included.
        plugins: op_types that run as plugins.
    """
    start, stop = inputs.program.layer_range
    mtp = len(inputs.program.graphs) - 1
    per_cache = cache_bytes / (stop - start + mtp)
    layers = [per_cache] * (stop - start)
    before = family_of(inputs.config).names_before(inputs.config)
    tables = embedding = behind = 0
    for one in _held(inputs, plugins):
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


def block_bytes(program: Program, config: ModelConfig, kv_format: str) -> int:
    """Bytes of one cache block over all layers of all graphs."""
    layers = sum(len(face.with_role("cache")) // 2 for face in program.graphs.values())
    return BLOCK_SIZE * cache_bytes_per_token(config, kv_format, num_layers=layers)  # pyright: ignore[reportArgumentType]


def _memory_refusal(
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
    start, stop = inputs.program.layer_range
    other = device["total"] - device["weights"] - device["cache"]
    count = layers_that_fit(inputs, device["usable"] - other, device["cache"], plugins)
    remedy = (
        f"at most {count} of its {stop - start} layers fit: export stages with --layers"
        if count
        else "not one layer fits"
    )
    return (
        f"the engine {needs}, of it {device['weights'] / GIB:.1f} GiB of weights; {remedy} "
        f"('seekforge plan' says how many GPUs hold it all), {allow}"
    )
