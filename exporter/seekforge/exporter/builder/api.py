"""`seekforge.build`: canonical program -> engine for one target."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from seekforge.common.cli.console import Stages
from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.common.files import check_vacant
from seekforge.common.outputs import check_distinct, check_output
from seekforge.exporter.builder.request import fit_limits, read_graph
from seekforge.exporter.calls import (
    AnyPath,
    Count,
    Counts,
    Flag,
    Progress,
    Settings,
    Size,
    Source,
    many,
    public,
    stages_of,
)
from seekforge.exporter.checkpoint.source import headers, parse_repo, resolve
from seekforge.exporter.checkpoint.text_files import check_weight_files
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import MANIFEST, Audit, Limits, Manifest, SelfCheck
from seekforge.formats.program import load_program
from seekforge.formats.targets import (
    CPU_PRECISIONS,
    GPU_PRECISIONS,
    RTX_SMS,
    TargetConfig,
    asked_limits,
    load_target,
)

if TYPE_CHECKING:
    from seekforge.exporter.builder.tensorrt.check import Choices, Inputs, Planned

#: Keywords that only a GPU build knows: name -> value when it was not given.
_GPU_OPTIONS = {
    "kv_cache_dtype": None,
    "sm": (),
    "plugins": None,
    "workspace": None,
    "timing_cache": None,
    "builder_optimization_level": None,
    "layers_per_engine": None,
    "kernels": True,
    "allow_oversize": False,
}
#: Facts that JSON has also where they are None.
_ALWAYS = ("self_check", "warning")


@dataclass(frozen=True)
class BuildResult:
    """An engine that was built, or what would be built by a dry run. What does not apply is None.

    Attributes:
        path: the engine's folder.
        target, backend, sms: what it is for; a CPU has no SMs.
        precision: of weights on a CPU, of products of FP8 weights on a GPU.
        formats: the same in words.
        limits: of requests and steps.
        dry_run: whether nothing was written.
        seconds: of each stage of the work.
        manifest: of the engine that was written.
        num_nodes: CPU: of each graph.
        weight_bytes: CPU: that the engine holds.
        layers: CPU, dry run: [first, end) of those of the program.
        disk_free_bytes: CPU, dry run: where the engine would lie.
        warning: CPU, dry run: what the engine will meet on this machine.
        products, kv_cache_dtype, fp8_storage: GPU, dry run: formats of products, caches and weights.
        plugins, inlined: GPU, dry run: custom operators, name -> how many.
        device_bytes: GPU, dry run: expected memory by part, with `total` and `usable`.
        oversize: GPU, dry run: whether that does not fit.
        profiles: GPU, dry run: names of the optimization profiles.
        missing: GPU, dry run: what this machine lacks for the build, a sentence each.
    """

    path: Path
    target: str
    backend: str
    sms: tuple[int, ...]
    precision: str
    formats: str
    limits: Limits
    dry_run: bool
    seconds: Mapping[str, float]
    manifest: Manifest | None = None
    num_nodes: Mapping[str, int] | None = None
    weight_bytes: int | None = None
    layers: tuple[int, int] | None = None
    disk_free_bytes: int | None = None
    warning: str | None = None
    products: str | None = None
    kv_cache_dtype: str | None = None
    fp8_storage: str | None = None
    plugins: Mapping[str, int] | None = None
    inlined: Mapping[str, int] | None = None
    device_bytes: Mapping[str, int] | None = None
    oversize: bool | None = None
    profiles: tuple[str, ...] | None = None
    missing: tuple[str, ...] | None = None

    @property
    def numerics(self) -> str | None:
        """Name of the numerics of the engine that was written."""
        return None if self.manifest is None else str(self.manifest.numerics["name"])

    @property
    def self_check(self) -> SelfCheck | None:
        """What the engine is compared with as it starts."""
        return None if self.manifest is None else self.manifest.self_check

    @property
    def audit(self) -> Audit | None:
        """GPU: what the compiler made of the program."""
        return None if self.manifest is None else self.manifest.audit

    def to_json(self) -> dict[str, Any]:
        """Return what `seekforge build --json` prints: facts that do not apply are left out."""
        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "manifest"}
        check = self.self_check
        facts |= {
            "path": str(self.path),
            "limits": self.limits.model_dump(),
            "max_model_len": self.limits.max_model_len,
            "numerics": self.numerics,
            "self_check": None if check is None else {"tolerance": check.tolerance, "reason": check.reason},
            "audit": None if self.audit is None else self.audit.model_dump(mode="json"),
        }
        return {name: value for name, value in facts.items() if value is not None or name in _ALWAYS}


@public
def build(
    program: AnyPath,
    out: AnyPath,
    *,
    target: Source,
    set: Settings = (),
    checkpoint: Source | None = None,
    max_batch_size: Count | None = None,
    max_model_len: Count | None = None,
    max_num_batched_tokens: Count | None = None,
    precision: Literal["f32", "int8", "int4", "bf16", "fp8"] | None = None,
    kv_cache_dtype: Literal["fp8_ds", "bf16"] | None = None,
    sm: Counts = (),
    plugins: Literal["auto", "all", "none"] | None = None,
    workspace: Size | None = None,
    timing_cache: AnyPath | None = None,
    builder_optimization_level: Literal[0, 1, 2, 3, 4, 5] | None = None,
    layers_per_engine: Count | None = None,
    kernels: Flag = True,
    allow_oversize: Flag = False,
    dry_run: Flag = False,
    taps: Flag = False,
    force: Flag = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Build an engine for one target from a program.

    A CPU engine is compared with the PyTorch model before it is written, and holds its weights. A GPU engine takes its
    weights from the checkpoint when it runs, so a program of any size builds anywhere.

    Args:
        program: folder that `export` wrote.
        out: the folder to make.
        target: a name of `seekforge targets`, or the path of a YAML file.
        set: changes of keys of the target: `{"limits.max_batch_size": 8}`, or texts as `--set` takes them.
        checkpoint: what the program was exported from, a folder or a repository. CPU: its weights go into the engine;
            GPU: remembered, not read.
        max_batch_size: most sequences of a step.
        max_model_len: longest sequence, prompt and answer together.
        max_num_batched_tokens: most tokens of a step.
        precision: CPU: of the weights, f32, int8 or int4; GPU: of products of FP8 weights, bf16 or fp8.
        kv_cache_dtype: GPU: format of the caches.
        sm: tensorrt-rtx: other SMs that the plan shall run on.
        plugins: GPU: operators as plugins: all, none (inlined), or auto, the default: all that the model's sizes allow.
        workspace: GPU: most scratch memory of one layer, in bytes.
        timing_cache: tensorrt: file of measured tactics.
        builder_optimization_level: GPU: the library's.
        layers_per_engine: GPU: most layers of one plan.
        kernels: GPU: compile the plugins' kernels; an engine without can be looked at, not run.
        allow_oversize: GPU: build what does not fit; it is marked and does not load.
        dry_run: check everything, build nothing.
        taps: let the engine show the tensors inside each layer, for `parity`.
        force: replace an engine that stands at `out`.
        progress: told each stage.

    Raises:
        OptionError: an argument is none that it takes.
        TargetError: the target is unknown, or cannot do what was asked.
        ConfigError, CheckpointError, ProgramError: program or checkpoint is damaged, or they do not belong together.
        EngineError: what was compiled does not compute what it should, or the compiler failed.
        OutputError: `out` cannot be written.
        EnvironmentFault: a library is not installed.
    """
    places = _Places(Path(program), Path(out), None if checkpoint is None else str(checkpoint), force)
    cache = None if timing_cache is None else Path(timing_cache)
    check_output(places.out, "folder")
    if cache is not None:
        check_output(cache, "file")
    check_distinct(
        [(places.out, "folder"), *([] if cache is None else [(cache, "file")])], [program, target, checkpoint]
    )
    settings = cast("tuple[str, ...]", many(set))  # `public` made them texts
    config = load_target(str(target), settings)
    stages = stages_of(progress)
    limits = {
        "max_batch_size": max_batch_size,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    config = with_options(config, limits, precision)
    asked = asked_limits(settings) | {name for name, value in limits.items() if value is not None}
    gpu: dict[str, Any] = {
        "kv_cache_dtype": kv_cache_dtype,
        "sm": many(sm),
        "plugins": plugins,
        "workspace": workspace,
        "timing_cache": cache,
        "builder_optimization_level": builder_optimization_level,
        "layers_per_engine": layers_per_engine,
        "kernels": kernels,
        "allow_oversize": allow_oversize,
    }
    if config.backend == "onnxruntime":
        for name, value in gpu.items():
            if value != _GPU_OPTIONS[name]:
                option = "no-kernels" if name == "kernels" else name.replace("_", "-")
                raise TargetError(f"--{option} is for GPU targets, target {config.name} does not know it")
        return _build_cpu(places, config, asked, stages, taps=taps, dry_run=dry_run)
    if taps and layers_per_engine is not None:
        raise TargetError("--taps shows the layers of one plan; leave out --layers-per-engine")
    return _build_gpu(places, config, asked, stages, gpu, taps=taps, dry_run=dry_run)


@dataclass(frozen=True)
class _Places:
    """What a build reads and writes."""

    program: Path
    out: Path
    checkpoint: str | None
    force: bool

    def check_vacant(self) -> None:
        """Refuse a place that is taken."""
        check_vacant(self.out, force=self.force, marker=MANIFEST)


def _build_cpu(
    places: _Places, target: TargetConfig, asked: Collection[str], stages: Stages, *, taps: bool, dry_run: bool
) -> BuildResult:
    """Build for a CPU. A repository is downloaded once its headers say that it can be built."""
    checkpoint = places.checkpoint
    if checkpoint is None:
        raise TargetError(f"target {target.name} keeps the weights in the engine; pass --checkpoint FOLDER")
    for face in load_program(places.program).graphs.values():  # what is odd is said before torch is imported
        read_graph(places.program, face)
    from_hub = parse_repo(checkpoint) is not None
    if not from_hub and Path(checkpoint).is_dir():
        ModelConfig.load(Path(checkpoint))
        check_weight_files(Path(checkpoint))
    if dry_run or from_hub:
        from seekforge.exporter.builder.onnxruntime.build import check  # brings torch, which GPU builds do without

        stages("read program and checkpoint")
        with headers(checkpoint, say=stages) as folder:
            planned = check(places.program, places.out, target=target, checkpoint_folder=folder, asked=asked)
        places.check_vacant()
        if dry_run:
            stages.done()
            return replace(
                _result(places, target, planned.limits, stages, dry_run=True),
                layers=planned.program.layer_range,
                weight_bytes=planned.weight_bytes,
                disk_free_bytes=planned.free_bytes,
                warning=planned.warning or None,
            )
    if from_hub:
        stages(f"download {checkpoint}")
    folder = resolve(checkpoint, quiet=stages.quiet)
    ModelConfig.load(folder)
    from seekforge.exporter.builder.onnxruntime.build import build as write_engine

    built = write_engine(
        places.program,
        places.out,
        target=target,
        checkpoint_folder=folder,
        max_model_len=None,
        force=places.force,
        progress=stages,
        taps=taps,
        asked=asked,
    )
    stages.done()
    return replace(
        _result(places, target, built.manifest.limits, stages, dry_run=False),
        precision=str(built.manifest.build["precision"]),
        manifest=built.manifest,
        num_nodes=built.num_nodes,
        weight_bytes=built.weight_bytes,
    )


def _build_gpu(
    places: _Places,
    target: TargetConfig,
    asked: Collection[str],
    stages: Stages,
    gpu: Mapping[str, Any],
    *,
    taps: bool,
    dry_run: bool,
) -> BuildResult:
    from seekforge.exporter.builder.tensorrt.build import build_gpu
    from seekforge.exporter.builder.tensorrt.check import Choices, check
    from seekforge.exporter.builder.tensorrt.compiler import Options

    target = _with_gpu_options(target, gpu)
    if gpu["timing_cache"] is not None and target.backend == "tensorrt-rtx":
        raise TargetError("--timing-cache is for tensorrt; tensorrt-rtx measures on the GPU that runs the engine")
    choices = Choices(
        plugins=gpu["plugins"] or "auto",
        allow_oversize=gpu["allow_oversize"],
        kernels=gpu["kernels"],
        layers_per_engine=gpu["layers_per_engine"],
        taps=taps,
        compiler=Options(
            workspace_bytes=gpu["workspace"],
            optimization_level=gpu["builder_optimization_level"],
            timing_cache=gpu["timing_cache"],
        ),
    )
    stages("read program and check")
    inputs = _open_inputs(places.program, places.checkpoint, stages)
    target = target.model_copy(update={"limits": fit_limits(target.limits, inputs.config, asked)})
    planned = check(inputs, target, choices)
    if not dry_run:
        manifest = build_gpu(inputs, planned, places.out, choices=choices, force=places.force, progress=stages)
        stages.done()
        made = _result(places, planned.target, manifest.limits, stages, dry_run=False)
        return replace(made, sms=tuple(manifest.target.sms), manifest=manifest)
    places.check_vacant()
    missing = _missing_here(inputs, planned, choices)
    stages.done()
    return replace(
        _result(places, planned.target, planned.limits, stages, dry_run=True),
        products=planned.target.products,
        kv_cache_dtype=planned.target.kv_format,
        fp8_storage=planned.how.fp8_storage,
        plugins={op: inputs.ops[op] for op in planned.plugins},
        inlined={op: inputs.ops[op] for op in planned.inlined},
        device_bytes=planned.device_bytes,
        oversize=planned.oversize,
        profiles=tuple(planned.target.profiles),
        missing=tuple(missing),
    )


def _result(places: _Places, target: TargetConfig, limits: Limits, stages: Stages, *, dry_run: bool) -> BuildResult:
    """Return what is the same of every target."""
    return BuildResult(
        path=places.out,
        target=target.name,
        backend=target.backend,
        sms=target.sms,
        precision=target.precision,
        formats=target.formats,
        limits=limits,
        dry_run=dry_run,
        seconds={stage: round(value, 3) for stage, value in stages.seconds.items()},
    )


def _open_inputs(program: Path, checkpoint: str | None, stages: Stages) -> Inputs:
    """Open a program and the headers of its checkpoint; where a repository is kept is not remembered."""
    from seekforge.exporter.builder.tensorrt.check import open_inputs

    if checkpoint is None:
        return open_inputs(program, None)
    with headers(checkpoint, say=stages) as folder:
        inputs = open_inputs(program, folder)
    if parse_repo(checkpoint) is None:
        return inputs
    return replace(inputs, weights=inputs.weights.model_copy(update={"path": None}))


def with_options(target: TargetConfig, limits: Mapping[str, int | None], precision: str | None) -> TargetConfig:
    """Return the target as the options change it that all targets know, checked again.

    Raises:
        TargetError: the target does not take one.
    """
    settings = [f"limits.{name}={value}" for name, value in limits.items() if value is not None]
    if precision is not None:
        on_cpu = target.backend == "onnxruntime"
        if on_cpu and precision not in CPU_PRECISIONS:
            raise TargetError(f"--precision {precision} is for GPUs; a CPU knows {', '.join(CPU_PRECISIONS)}")
        if not on_cpu and precision not in GPU_PRECISIONS:
            known = " or ".join(GPU_PRECISIONS)
            raise TargetError(f"--precision {precision} is for CPUs; target {target.name} takes {known}")
        settings.append(f"precision={precision}")
    return target.changed(settings)


def _with_gpu_options(target: TargetConfig, gpu: Mapping[str, Any]) -> TargetConfig:
    settings = []
    if gpu["kv_cache_dtype"] is not None:
        settings.append(f"kv_format={gpu['kv_cache_dtype']}")
    if gpu["sm"]:
        if target.backend == "tensorrt":
            raise TargetError(
                f"--sm {gpu['sm'][0]} is for tensorrt-rtx; target {target.name} is built by TensorRT, whose "
                f"plans run on one SM, here sm{target.sm}: pass the target of the other GPU "
                "('seekforge targets' lists them)"
            )
        wrong = next((sm for sm in gpu["sm"] if sm not in RTX_SMS), None)
        if wrong is not None:
            known = ", ".join(map(str, RTX_SMS))
            raise TargetError(f"--sm {wrong} is not one that tensorrt-rtx compiles for ({known})")
        settings.append(f"also={[*target.also, *gpu['sm']]}")
    return target.changed(settings)


def _missing_here(inputs: Inputs, planned: Planned, choices: Choices) -> list[str]:
    """Return what this machine lacks for a build, one sentence each. A plan may be made where the build is not.

    Raises:
        ShapeError: there are no kernels for the model's sizes, on no machine.
    """
    from seekforge.exporter.builder.tensorrt.kernels import kernel_tasks
    from seekforge.plugins.tensorrt.library import load

    target = planned.target
    assert target.backend != "onnxruntime" and target.sm is not None
    missing = []
    try:
        load(target.backend)
    except EnvironmentFault as error:
        missing.append(str(error))
    if target.backend == "tensorrt" and target.sm not in _sms_here():
        missing.append(f"no GPU of sm{target.sm} here; TensorRT measures on the GPU that it builds for")
    if choices.kernels:
        try:
            kernel_tasks(inputs.program, inputs.config, target, planned.plugins)
        except EnvironmentFault as error:
            missing.append(str(error))
    return missing


def _sms_here() -> list[int]:
    """Ask nvidia-smi for the SMs of the GPUs here; none where there is no answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    question = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line.replace(".", "")) for line in answer.split() if line.replace(".", "").isdigit()]
