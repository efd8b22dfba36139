"""`build --target cpu`: specialize to f32, fold or quantize the weights, inline the bodies, prove the result, write a
manifest.

A CPU engine holds its weights, so before any work their bytes are compared with the disk: a build that would fill it is
refused. Memory is not: weights are mapped, and the engine may be for another machine; there is a warning.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from rich.filesize import decimal

from seekforge.common.cli.console import Stages
from seekforge.common.dtypes import itemsize
from seekforge.common.errors import EnvironmentFault, OutputError, TargetError
from seekforge.common.files import atomic_folder
from seekforge.common.requirements import onnxruntime_conflict, onnxruntime_package
from seekforge.exporter.builder.engine_writer import EngineParts, write_engine
from seekforge.exporter.builder.generation import read_generation
from seekforge.exporter.builder.judge import check_measurable, judge
from seekforge.exporter.builder.onnxruntime.cuda_operators import on_the_cpu
from seekforge.exporter.builder.onnxruntime.fold import WeightFile
from seekforge.exporter.builder.onnxruntime.graphs import ROPE_TABLES, finish_graph, fold_graph, write_graph
from seekforge.exporter.builder.onnxruntime.quantize import choose
from seekforge.exporter.builder.onnxruntime.rank_build import fold_ranks
from seekforge.exporter.builder.onnxruntime.rank_session import RankSession
from seekforge.exporter.builder.onnxruntime.self_check import make_self_check
from seekforge.exporter.builder.onnxruntime.session import OrtSession
from seekforge.exporter.builder.options import DEFAULTS, BuildOptions
from seekforge.exporter.builder.request import (
    check_program,
    check_same_model,
    check_takes,
    fit_limits,
    read_graph,
)
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.validate import scan_values
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import MANIFEST, Limits, Manifest
from seekforge.formats.engine.ranks import Ranks, joined
from seekforge.formats.engine.weight_file import ALIGNMENT, WEIGHTS, is_divided
from seekforge.formats.int_quant import Quantization
from seekforge.formats.program import GraphIO, Program, load_bindings, load_program
from seekforge.formats.step_io import MODEL
from seekforge.formats.step_runner import StepRunner
from seekforge.formats.targets import Precision, TargetConfig
from seekforge.formats.weight_recipes import QuantizedOnce, Recipe, tensors_of
from seekforge.plugins.operator import cdiv

#: What numbers become in an engine with f32 activations.
_F32_BYTES = {"f8e4m3": 4, "bf16": 4, "f32": 4}
#: Bytes of codes that are kept between the file and the self-check, which is given the same codes.
_KEPT_CODES = 1 << 30
#: From the largest engine to the smallest.
_PRECISIONS: tuple[Precision, ...] = ("f32", "int8", "int4")


@dataclass(frozen=True)
class Built:
    """What `build` wrote."""

    manifest: Manifest
    num_nodes: dict[str, int]
    weight_bytes: int


@dataclass(frozen=True)
class CpuBuild:
    """What will be built for a CPU: the result of all checks, before any work.

    Attributes:
        program, bindings: the program.
        config: the program's config.
        whole: the checkpoint's config, of all layers.
        limits: the limits of the engine.
        coded: which weights become codes; None: none.
        weight_bytes: bytes of weights that the engine will hold.
        free_bytes: what is free on the disk where the engine will lie.
        warning: what the engine will meet on this machine; empty: nothing.
        provider: which of ONNX Runtime's runs it; None: that of the CPU.
    """

    program: Program
    bindings: dict[str, dict[str, Recipe]]
    config: ModelConfig
    whole: ModelConfig
    limits: Limits
    coded: Quantization | None
    weight_bytes: int
    free_bytes: int
    warning: str
    provider: str | None = None


def check(
    program_folder: Path, out: Path, *, target: TargetConfig, checkpoint_folder: Path, options: BuildOptions = DEFAULTS
) -> CpuBuild:
    """Decide what will be built, or refuse with one sentence that names what would work. Arguments as of `build`."""
    if target.backend != "onnxruntime":
        raise TargetError(f"target {target.name} needs the {target.backend} backend, which this version does not build")
    conflict = onnxruntime_conflict()
    if conflict:
        raise EnvironmentFault(conflict)
    program = load_program(program_folder)
    bindings = load_bindings(program_folder)
    check_program(program, bindings, program_folder)
    config = ModelConfig.parse(program.config, str(program_folder / "program.json"))
    read_generation(program_folder, config)
    with open_checkpoint(checkpoint_folder) as opened:
        whole = opened.config
        check_same_model(program, config, whole, checkpoint_folder)
        check_takes(bindings, opened.checkpoint, program_folder)
    limits = fit_limits(target.limits, config, options.named_limits)
    if options.quality is not None:
        check_measurable(program, program_folder, limits, options.quality)
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if program.parallelism.num_ranks > 1 and target.provider is not None:
        raise TargetError(
            f"target {target.name} runs on one GPU; pass --target cpu, or export the program without "
            f"{program.parallelism.options}"
        )
    tp = program.parallelism.tp

    def sizes_of(how: Quantization | None) -> dict[int | None, int]:
        return layer_bytes(bindings, how, limits.max_model_len, tp)

    coded = choose(target, config, bindings)
    sizes = {target.precision: sizes_of(coded)}
    needed = sum(sizes[target.precision].values())
    if needed > free:
        for smaller in _PRECISIONS[_PRECISIONS.index(target.precision) + 1 :]:
            with contextlib.suppress(TargetError):  # some rows have no whole blocks
                sizes[smaller] = sizes_of(choose(target.model_copy(update={"precision": smaller}), config, bindings))
        raise OutputError(_disk_refusal(program, target.precision, sizes, free, place))
    memory = _memory_bytes()
    warning = ""
    if memory is not None and needed > memory:
        warning = (
            f"the weights are {decimal(needed)} and this machine has {decimal(memory)} of memory: here the "
            "engine will run at the speed of the disk, if at all"
        )
    return CpuBuild(program, bindings, config, whole, limits, coded, needed, free, warning, target.provider)


def _memory_bytes() -> int | None:
    """All memory of this machine; None where nobody tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def layer_bytes(
    bindings: Mapping[str, Mapping[str, Recipe]], coded: Quantization | None, max_model_len: int, tp: int = 1
) -> dict[int | None, int]:
    """Return layer -> bytes of its weights in an engine; None: what belongs to no layer.

    Args:
        bindings: graph -> weight or table -> recipe, as a program has them.
        coded: which weights become codes.
        max_model_len: rows of the RoPE tables.
        tp: ranks that each have their own part of what is divided.
    """
    sizes: dict[int | None, int] = defaultdict(int)
    stored: dict[str, list[Recipe]] = defaultdict(list)
    for recipes in bindings.values():
        for name, recipe in recipes.items():
            if name.removesuffix("_scale") in recipes and name.endswith("_scale"):
                continue  # of an FP8 weight, which is dequantized
            if recipe in stored[name]:
                continue  # graphs share what they both read
            stored[name].append(recipe)
            parts = name.split(".")
            layer = int(parts[1]) if parts[0] == "layers" else None
            size = sum(map(_aligned, _constant_bytes(name, recipe, coded, max_model_len)))
            sizes[layer] += size * (tp if is_divided(recipe) else 1)
    return dict(sizes)


def _aligned(num_bytes: int) -> int:
    return cdiv(num_bytes, ALIGNMENT) * ALIGNMENT


def _constant_bytes(name: str, recipe: Recipe, coded: Quantization | None, max_model_len: int) -> list[int]:
    """Return the bytes of what an engine makes of one weight or table: itself, or its codes and their scales."""
    elements = math.prod(recipe.shape)
    if name in ROPE_TABLES:
        elements = elements // recipe.shape[0] * max_model_len
    bits = None if coded is None else coded.bits(name)
    if coded is None or bits is None:
        return [elements * _F32_BYTES.get(recipe.dtype, itemsize(recipe.dtype))]
    return [elements * bits // 8, elements // coded.block_size * 4]


def _disk_refusal(
    program: Program, precision: Precision, sizes: Mapping[str, dict[int | None, int]], free: int, place: Path
) -> str:
    """Say by how much an engine does not fit on the disk, and what would."""
    needs = f"the engine takes {decimal(sum(sizes[precision].values()))} at {precision}, and {place} has"
    smaller = [one for one in sizes if one != precision]
    for one in smaller:
        total = sum(sizes[one].values())
        if total <= free:
            return (
                f"{needs} {decimal(free)} free; pass --precision {one} ({decimal(total)}), or an OUT on a larger disk"
            )
    smallest = smaller[-1] if smaller else precision
    total = sizes[smallest].get(None, 0)
    start, stop = program.layer_range
    fitting = 0
    for layer in range(start, stop):
        total += sizes[smallest].get(layer, 0)
        if total > free:
            break
        fitting += 1
    how = f" with --precision {smallest}" if smaller else ""
    whole = program.gives_logits and start == 0
    export = f"--num-layers {fitting}" if whole else f"--layers {start}-{start + fitting - 1}"
    remedy = (
        f"{fitting} of its {stop - start} layers fit{how}: export with {export}" if fitting else "not one layer fits"
    )
    return f"{needs} {decimal(free)} free; {remedy}, or pass an OUT on a larger disk"


def build(
    program_folder: Path,
    out: Path,
    *,
    target: TargetConfig,
    checkpoint_folder: Path,
    options: BuildOptions = DEFAULTS,
    force: bool,
    progress: Stages,
) -> Built:
    """Build an engine folder.

    Args:
        program_folder: a program, written by `export`.
        out: the folder to make.
        target: the target as options changed it.
        checkpoint_folder: the weights; it must have the program's config.
        options: the options of the build: here its limits, and whether the graphs also give the tensors inside each
            layer, for `parity`.
        force: replace an engine that stands at `out`.
        progress: told each stage.

    Raises:
        ProgramError, CheckpointError: program or weights are damaged or do not belong together.
        TargetError: the target cannot do this, or is not built here.
        EngineError: the built engine does not compute what PyTorch computes, or misses a bound of its quality.
        OutputError: `out` cannot be written, or the disk is too small.
    """
    progress("read program and checkpoint")
    checked = check(program_folder, out, target=target, checkpoint_folder=checkpoint_folder, options=options)
    if checked.warning:
        progress.say(checked.warning)
    program, bindings, config = checked.program, checked.bindings, checked.config
    limits, coded = checked.limits, checked.coded
    with (
        Checkpoint.open(checkpoint_folder) as checkpoint,
        atomic_folder(out, force=force, marker=MANIFEST) as folder,
    ):
        with progress.bytes_bar("scan weights (NaN, scales, copies)") as bar:
            scan_values(checkpoint, checked.whole, names=_read_tensors(program, bindings, checkpoint), progress=bar)
        progress("specialize and fold")
        make = _one_rank if program.parallelism.num_ranks == 1 else _several_ranks
        source = QuantizedOnce(checkpoint, _KEPT_CODES)
        made = make(program_folder, checked, folder, source, options, progress)
        self_check = None
        if program.gives_logits:
            progress("self-check against PyTorch")
            self_check = make_self_check(made.session(), config, program.numerics, source, limits, coded)
        parts = EngineParts(
            target=target,
            limits=limits,
            kv_format="f32",
            graphs=made.graphs,
            stages=made.stages,
            bindings=made.bindings,
            files=made.files,
            versions={
                name: importlib.metadata.version(name) for name in ("onnx", onnxruntime_package(), "torch", "numpy")
            },
            options={
                "activations": "f32",
                "precision": target.precision,
                "taps": options.taps,
                **({} if target.provider is None else {"on_the_cpu": made.on_the_cpu}),
            },
            self_check=self_check,
            quantization=coded,
            ranks=made.ranks,
        )
        manifest = write_engine(folder, parts, program_folder=program_folder, program=program, config=config)
        if options.quality is not None:
            progress("quality")
            manifest = judge(folder, manifest, options.quality, out=out, say=progress.update)
    return Built(manifest, made.num_nodes, made.weight_bytes)


@dataclass(frozen=True)
class _Made:
    """What was written of an engine.

    Attributes:
        graphs, stages, bindings, files, ranks: fields of `EngineParts`.
        session: opens what runs it, for a check.
        num_nodes, weight_bytes: fields of `Built`.
        on_the_cpu: graph -> operators that a GPU's provider leaves to the CPU; empty for a CPU.
    """

    graphs: dict[str, GraphIO]
    bindings: Mapping[str, Mapping[str, Recipe]]
    files: list[str]
    session: Callable[[], StepRunner]
    num_nodes: dict[str, int]
    weight_bytes: int
    stages: dict[str, tuple[GraphIO, ...]] = field(default_factory=dict)
    ranks: Ranks | None = None
    on_the_cpu: dict[str, dict[str, int]] = field(default_factory=dict)


def _one_rank(
    program_folder: Path,
    checked: CpuBuild,
    folder: Path,
    source: QuantizedOnce,
    options: BuildOptions,
    progress: Stages,
) -> _Made:
    """Write graphs and weights of an engine of one rank into `folder`."""
    program, coded, is_cuda = checked.program, checked.coded, checked.provider == "cuda"
    weights = WeightFile(WEIGHTS)
    graphs: dict[str, onnx.ModelProto] = {}
    for name, canonical in program.graphs.items():
        model, constants = fold_graph(
            read_graph(program_folder, canonical),
            checked.bindings[name],
            checked.config,
            coded=coded,
            limits=checked.limits,
            taps=options.taps,
        )
        weights.attach(model, constants)
        graphs[name] = finish_graph(model, native=not is_cuda)
    with progress.bytes_bar("dequantize weights" if coded is None else f"{coded.smallest} weights") as bar:
        weights.write(folder, source, bar)
    progress("inline, check, write")
    described = {name: write_graph(model, folder, program.graphs[name]) for name, model in graphs.items()}
    return _Made(
        graphs=described,
        bindings=dict(zip(graphs, weights.attached, strict=True)),
        files=[*(graph.file for graph in described.values()), WEIGHTS],
        session=lambda: OrtSession(folder, {MODEL: described[MODEL]}),
        num_nodes={name: len(model.graph.node) for name, model in graphs.items()},
        weight_bytes=weights.num_bytes,
        on_the_cpu={name: on_the_cpu(model) for name, model in graphs.items()} if is_cuda else {},
    )


def _several_ranks(
    program_folder: Path,
    checked: CpuBuild,
    folder: Path,
    source: QuantizedOnce,
    options: BuildOptions,
    progress: Stages,
) -> _Made:
    """Write pieces and weights of an engine of several ranks into `folder`."""
    program, coded = checked.program, checked.coded
    made = fold_ranks(
        program_folder,
        program,
        checked.bindings,
        checked.config,
        coded=coded,
        limits=checked.limits,
        taps=options.taps,
    )
    with progress.bytes_bar("dequantize weights" if coded is None else f"{coded.smallest} weights") as bar:
        made.write_weights(folder, source, bar)
    progress("inline, check, write")
    pieces = made.write_graphs(folder, program)
    by_name = {Path(piece.file).stem: piece for graph in pieces.values() for piece in graph}
    return _Made(
        graphs={graph: joined(ios) for graph, ios in pieces.items()},
        stages=pieces,
        bindings=made.bindings,
        files=[*(piece.file for piece in by_name.values()), *made.files],
        session=lambda: RankSession(folder, made.ranks, by_name, made.bindings),
        num_nodes=made.num_nodes(),
        weight_bytes=made.num_bytes,
        ranks=made.ranks,
    )


def _read_tensors(program: Program, bindings: dict[str, dict[str, Recipe]], checkpoint: Checkpoint) -> list[str] | None:
    """Return the checkpoint tensors of a part of a model, in the order of its inputs; None for a whole model."""
    if not program.outside:
        return None
    names = (
        name for recipes in bindings.values() for recipe in recipes.values() for name in sorted(tensors_of(recipe))
    )
    return list(dict.fromkeys([*names, *(name for name in program.unused if name in checkpoint)]))
