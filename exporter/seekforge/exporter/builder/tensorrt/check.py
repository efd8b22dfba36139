"""What a GPU build checks before any work: program, checkpoint, precision, limits, operators and memory.

Everything that cannot work is refused here with one sentence that names what would.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from seekforge.common.errors import TargetError
from seekforge.common.paths import real_path
from seekforge.exporter.builder.generation import read_generation
from seekforge.exporter.builder.options import BuildOptions, PluginChoice
from seekforge.exporter.builder.request import (
    check_program,
    check_same_model,
    check_takes,
    fit_limits,
    read_graph,
)
from seekforge.exporter.builder.tensorrt.graph import wide_weights
from seekforge.exporter.builder.tensorrt.memory import fullest, memory_refusal, stage_bytes
from seekforge.exporter.builder.tensorrt.passes.add_norms import fusible_norms
from seekforge.exporter.builder.tensorrt.passes.bf16_linears import bf16_linear_weights
from seekforge.exporter.builder.tensorrt.passes.join_linears import join_linears
from seekforge.exporter.builder.tensorrt.passes.shared_experts import NEEDS, shared_experts
from seekforge.exporter.builder.tensorrt.profiles import axis_bounds, spanning
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import Limits, WeightSource
from seekforge.formats.numerics import numerics_from_dict
from seekforge.formats.program import Program, load_bindings, load_program
from seekforge.formats.support import supported
from seekforge.formats.targets import TargetConfig
from seekforge.formats.weight_recipes import Recipe
from seekforge.formats.weight_recipes.stored import WORDS
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.kernels.contracts import refusals
from seekforge.plugins.moe_experts.spec import SPEC as MOE_EXPERTS
from seekforge.plugins.operator import evaluate_dim
from seekforge.plugins.registry import (
    ADD_RMS_NORM_QUANTIZE,
    BF16_LINEAR,
    BLOCK_FP8_LINEAR,
    CACHE_OPS,
    FP8_OPS,
    OPERATORS,
    SPECS,
)
from seekforge.plugins.sum_ranks.spec import SPEC as SUM_RANKS
from seekforge.plugins.tensorrt.library import installed_version, large_tensor_fault


@dataclass(frozen=True)
class GpuBuild:
    """What will be built for a GPU: the result of all checks, before any work.

    Attributes:
        target: the target as options changed it, with the engine's limits.
        plugins, inlined: op_types that become plugins, and those whose bodies are inlined.
        how: dtypes of the specialization.
        device_bytes: expected use of one GPU, of several the fullest.
        stage_bytes: the same of a GPU of each pipeline stage.
        oversize: more is expected than there is.
        wide: graph -> weight inputs that the engine holds in f32.
        bf16_linears: graph -> weight inputs whose products are `Bf16Linear` plugins.
        num_nodes: op_type -> nodes of the engine, plugins or inlined.
    """

    target: TargetConfig
    plugins: tuple[str, ...]
    inlined: tuple[str, ...]
    how: Specialization
    device_bytes: dict[str, int]
    stage_bytes: tuple[dict[str, int], ...]
    oversize: bool
    wide: dict[str, set[str]]
    bf16_linears: dict[str, set[str]]
    num_nodes: dict[str, int]

    @property
    def limits(self) -> Limits:
        """The limits of the engine."""
        return self.target.limits

    @property
    def in_16_bits(self) -> tuple[str, ...]:
        """Operators of FP8 weights whose plugins multiply in F16, since they have others here."""
        return (MOE_EXPERTS.name,) if self.target.nvfp4_experts else ()


@dataclass(frozen=True)
class Inputs:
    """A program and, if given, its checkpoint; checked.

    Attributes:
        program, graphs, bindings: as files have them, without weights, but for linears that were joined.
        read_wide: graph -> BF16 weight inputs that it reads as f32 alone (`prepare.wide_weights`).
        bf16_linears: graph -> those of them that it only multiplies (`bf16_linear_weights`).
        num_norms: norms of all graphs that a build can make one operator (`fusible_norms`).
        num_shared: shared experts of all graphs that it can make one more of the routed ones (`shared_experts`).
    """

    folder: Path
    program: Program
    graphs: dict[str, onnx.ModelProto]
    read_wide: dict[str, set[str]]
    bf16_linears: dict[str, set[str]]
    num_norms: int
    num_shared: int
    bindings: dict[str, dict[str, Recipe]]
    config: ModelConfig
    weights: WeightSource

    @property
    def ops(self) -> dict[str, int]:
        """op_type -> nodes of the program and those that a build can put in, in the order of the registry.

        Sums over ranks are left out: they are layers of TensorRT's own, whatever is a plugin.
        """
        counts = {op: use.num_nodes for op, use in self.program.ops.items() if op != SUM_RANKS.name}
        counts[BF16_LINEAR] = sum(map(len, self.bf16_linears.values()))
        counts[ADD_RMS_NORM_QUANTIZE] = self.num_norms
        return {op: counts[op] for op in SPECS if counts.get(op)}

    def wide(self, plugins: Collection[str]) -> dict[str, set[str]]:
        """Return graph -> weight inputs that an engine with these plugins holds in f32."""
        linears = self.bf16_linears if BF16_LINEAR in plugins else {}
        return {name: wide - linears.get(name, set()) for name, wide in self.read_wide.items()}


def open_inputs(program_folder: Path, checkpoint_folder: Path | None, *, joins: bool = True) -> Inputs:
    """Read and check a program and the headers of its checkpoint; no weight bytes.

    Args:
        program_folder: what `export` wrote.
        checkpoint_folder: what it was exported from; None: not looked at.
        joins: whether linears that multiply one value become one, and a shared expert one more of the routed ones,
            which taps between them do not survive.

    Raises:
        ProgramError, CheckpointError, ConfigError: damaged, or they do not belong together.
    """
    program = load_program(program_folder)
    bindings = load_bindings(program_folder)
    check_program(program, bindings, program_folder)
    config = ModelConfig.parse(program.config, str(program_folder / "program.json"))
    read_generation(program_folder, config)
    graphs = {name: read_graph(program_folder, graph) for name, graph in program.graphs.items()}
    if joins:
        program, graphs, bindings = join_linears(program, graphs, bindings, config)
    wide = {
        name: wide_weights(graph, [spec.name for spec in program.graphs[name].with_role("weight")])
        for name, graph in graphs.items()
    }
    linears = {name: bf16_linear_weights(graph, wide[name]) for name, graph in graphs.items()}
    norms = sum(len(fusible_norms(graph)) for graph in graphs.values())
    shared = sum(len(shared_experts(graph)) for graph in graphs.values()) if joins else 0
    nowhere = WeightSource(path=None, index_digest=None)
    inputs = Inputs(program_folder, program, graphs, wide, linears, norms, shared, bindings, config, nowhere)
    if checkpoint_folder is None:
        return inputs
    with open_checkpoint(checkpoint_folder) as opened:
        check_same_model(program, config, opened.config, checkpoint_folder)
        check_takes(bindings, opened.checkpoint, program_folder)
        weights = WeightSource(path=str(real_path(checkpoint_folder)), index_digest=opened.checkpoint.index_digest())
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
    if config.keeps_weights(numerics_from_dict(program.numerics)):
        raise TargetError(_kept_refusal(target, config))
    fault = _fault(target, program, config, ops, wanted)
    if fault:
        raise TargetError(f"{fault}; {_remedy(target, program, config, ops, wanted)}")
    plugins = _choose_plugins(program, config, ops, wanted, target.kv_format)
    inlined = tuple(op for op in ops if op not in plugins)
    large = _large_tensor(inputs, target, limits)
    if large:
        raise TargetError(f"target {target.name}: {large}")
    bytes_only = any(OPERATORS[op].inlined_weights == "int8" for op in inlined)
    storage = "float8" if target.has_fp8 and not bytes_only else "int8"
    how = Specialization("bf16", storage, target.kv_format, "trt")
    stages = stage_bytes(inputs, target, limits, options.layers_per_plan, plugins)
    device = fullest(stages)
    oversize = device["total"] > device["usable"]
    if oversize and not options.tensorrt.allow_oversize:
        raise TargetError(memory_refusal(inputs, target, limits, options.layers_per_plan, plugins, device))
    return GpuBuild(
        target=target,
        plugins=plugins,
        inlined=inlined,
        how=how,
        device_bytes=device,
        stage_bytes=stages,
        oversize=oversize,
        wide=inputs.wide(plugins),
        bf16_linears=inputs.bf16_linears if BF16_LINEAR in plugins else {},
        num_nodes=_num_nodes(inputs, target, plugins),
    )


def _num_nodes(inputs: Inputs, target: TargetConfig, plugins: Collection[str]) -> dict[str, int]:
    counts = inputs.ops
    if NEEDS.issubset(plugins) and not target.nvfp4_experts:
        counts[BLOCK_FP8_LINEAR] -= 2 * inputs.num_shared
    return counts


def _kept_refusal(target: TargetConfig, config: ModelConfig) -> str:
    """Say why no engine for a GPU keeps weights as the checkpoint has them, and what does."""
    form = config.stored_form
    numerics = supported(config.model_type, form)["gpu"].numerics
    said = f"export with --numerics {' or '.join(numerics)}, or " if numerics else ""
    return (
        f"target {target.name}: engines for GPUs multiply FP8 blocks, and this program keeps its weights as "
        f"{WORDS[form]}; {said}pass --target cpu"
    )


def _fault(
    target: TargetConfig, program: Program, config: ModelConfig, ops: tuple[str, ...], wanted: PluginChoice
) -> str:
    """Return why precision, cache format, operators and the program's roundings do not go together, or nothing."""
    numerics = program.numerics
    if target.precision in ("fp8", "nvfp4") and numerics["act_quant"] != "ue8m0":
        return (
            f"--precision {target.precision} multiplies quantized activations, and the program has numerics "
            f"{numerics['name']!r} without them"
        )
    if target.nvfp4_experts and MOE_EXPERTS.name not in ops:
        return "--precision nvfp4 is for experts, and the program's layers have none"
    if target.kv_format == "fp8_ds" and not (numerics["kv_fp8"] and numerics["indexer_fp8"]):
        return (
            f"--kv-cache-dtype fp8_ds stores FP8, and the program has numerics {numerics['name']!r} without that "
            "rounding"
        )
    plugins = _choose_plugins(program, config, ops, wanted, target.kv_format)
    inlined = [op for op in ops if op not in plugins]
    broken = refusals(config, plugins=plugins, ops=ops, parallelism=program.parallelism, kv_format=target.kv_format)
    if broken:
        return f"target {target.name}: {broken[0]}"
    if target.products == "fp8" and any(op in inlined for op in FP8_OPS):
        names = " and ".join(op for op in FP8_OPS if op in inlined)
        return f"--precision {target.precision} needs {names} as plugin on sm{target.sm}, inlined it multiplies in BF16"
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
    graphs = inputs.program.graphs.values()
    specs = [spec for graph in graphs for spec in (*graph.inputs, *graph.outputs) if spec.role != "cache"]
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
        for precision in dict.fromkeys((target.precision, target.products, "bf16")):
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


def _choose_plugins(
    program: Program, config: ModelConfig, ops: tuple[str, ...], wanted: PluginChoice, kv_format: str
) -> tuple[str, ...]:
    match wanted:
        case "all":
            return ops
        case "none":
            return ()
        case _:
            layout = program.parallelism
            return tuple(
                op
                for op in ops
                if not refusals(config, plugins=[op], ops=[op], parallelism=layout, kv_format=kv_format)
            )
