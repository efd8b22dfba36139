"""`seekforge.build`: canonical program -> engine for one target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from seekforge.common.cli.console import Stages
from seekforge.common.errors import OptionError, TargetError
from seekforge.common.files import check_vacant
from seekforge.exporter.builder.machine import missing_here
from seekforge.exporter.builder.options import (
    DEFAULTS,
    BuildOptions,
    OptimizationLevel,
    PluginChoice,
    QualityBounds,
    TensorRtOptions,
)
from seekforge.exporter.builder.request import read_graph
from seekforge.exporter.calls import (
    AnyPath,
    Count,
    Counts,
    Flag,
    Kernels,
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
from seekforge.exporter.quality import read_bounds
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import MANIFEST, Audit, Limits, Manifest, SelfCheck
from seekforge.formats.program import load_program
from seekforge.formats.quality import Quality, read_tasks
from seekforge.formats.targets import Precision, TargetConfig, WeightBlockSize
from seekforge.plugins.kernels.providers.choice import read_choice

if TYPE_CHECKING:
    from seekforge.exporter.builder.tensorrt.check import Inputs

#: Facts that JSON has also where they are None.
_ALWAYS = ("self_check", "warning")


@dataclass(frozen=True)
class BuildResult:
    """An engine that was built, or what would be built by a dry run. What does not apply is None.

    Attributes:
        path: the engine's folder.
        target, backend, sms: what it is for; a CPU has no SMs.
        precision: the precision of weights on a CPU, of products of FP8 weights on a GPU.
        formats: the same in words.
        limits: the limits of requests and steps.
        dry_run: whether nothing was written.
        seconds: how long each stage of the work took.
        manifest: the manifest of the engine that was written.
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
    def quality(self) -> Quality | None:
        """CPU: what the engine was measured to do; None: nothing was measured."""
        return None if self.manifest is None else self.manifest.quality

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
            "quality": None if self.quality is None else self.quality.model_dump(mode="json"),
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
    precision: Precision | None = None,
    weight_block_size: WeightBlockSize | None = None,
    kv_cache_dtype: Literal["fp8_ds", "bf16"] | None = None,
    sm: Counts = (),
    plugins: PluginChoice = DEFAULTS.tensorrt.plugins,
    workspace: Size | None = None,
    timing_cache: AnyPath | None = None,
    builder_optimization_level: OptimizationLevel | None = None,
    layers_per_engine: Count | None = None,
    kernels: Kernels = DEFAULTS.tensorrt.kernels,
    allow_oversize: Flag = DEFAULTS.tensorrt.allow_oversize,
    dry_run: Flag = False,
    taps: Flag = DEFAULTS.taps,
    quality: AnyPath | None = None,
    min_quality: Settings = (),
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
        set: changes of keys of the target: `{"limits.max_batch_size": 8}`, or texts as `--set` takes them. CPU: with a
            precision as the value, `{"experts": "int4"}`, of the weights with such a name or of such a kind.
        checkpoint: what the program was exported from, a folder or a repository. CPU: its weights go into the engine;
            GPU: remembered, not read.
        max_batch_size: most sequences of a step.
        max_model_len: longest sequence, prompt and answer together.
        max_num_batched_tokens: most tokens of a step.
        precision: CPU: of the weights, f32, int8 or int4; GPU: of products of FP8 weights, bf16 or
            fp8, or nvfp4: as fp8, with experts in NVFP4.
        weight_block_size: CPU: values of a row that share a scale, where weights are int8 or int4: 32, 64 or 128.
        kv_cache_dtype: GPU: format of the caches.
        sm: tensorrt-rtx: other SMs that the plan shall run on.
        plugins: GPU: operators as plugins: all, none (inlined), or auto, the default: all that the model's sizes allow.
        workspace: GPU: most scratch memory of one layer, in bytes.
        timing_cache: tensorrt: file of measured tactics.
        builder_optimization_level: GPU: the library's.
        layers_per_engine: GPU: most layers of one plan.
        kernels: GPU: compile the plugins' kernels; an engine without can be looked at, not run. `{"MoeRoute":
            "flashinfer"}`, or texts as `--kernels` takes them: those of an operator from a library.
        allow_oversize: GPU: build what does not fit; it is marked and does not load.
        dry_run: check everything, build nothing.
        taps: let the engine show the tensors inside each layer, for `parity`.
        quality: CPU: file of tasks that the engine is measured on; what came of it goes into the manifest.
        min_quality: refuse an engine that misses a bound: `{"arithmetic": 0.99, "english": 12.5}`, or texts as
            `--min-quality` takes them; the smallest score of a task with answers, the largest perplexity of one with
            texts.
        force: replace an engine that stands at `out`.
        progress: told each stage.

    Raises:
        OptionError: an argument is none that it takes.
        TargetError: the target is unknown, or cannot do what was asked.
        ConfigError, CheckpointError, ProgramError: program or checkpoint is damaged, or they do not belong together.
        EngineError: what was compiled does not compute what it should, misses a bound, or the compiler failed.
        OutputError: `out` cannot be written.
        EnvironmentFault: a library is not installed.
    """
    providers = () if isinstance(kernels, bool) else cast("tuple[str, ...]", kernels)
    read_choice(providers)
    options = BuildOptions(
        settings=cast("tuple[str, ...]", many(set)),  # `public` made them texts
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        precision=precision,
        weight_block_size=weight_block_size,
        taps=taps,
        quality=_quality_bounds(None if quality is None else Path(quality), cast("tuple[str, ...]", many(min_quality))),
        tensorrt=TensorRtOptions(
            kv_cache_dtype=kv_cache_dtype,
            sm=many(sm),
            plugins=plugins,
            workspace=workspace,
            timing_cache=None if timing_cache is None else Path(timing_cache),
            builder_optimization_level=builder_optimization_level,
            layers_per_engine=layers_per_engine,
            kernels=kernels is not False,
            providers=providers,
            allow_oversize=allow_oversize,
        ),
    )
    call = _Call(
        program=Path(program),
        out=Path(out),
        checkpoint=None if checkpoint is None else str(checkpoint),
        options=options,
        target=options.target(str(target)),
        force=force,
        dry_run=dry_run,
        stages=stages_of(progress),
    )
    return _build_cpu(call) if call.target.backend == "onnxruntime" else _build_gpu(call)


def _quality_bounds(path: Path | None, specs: tuple[str, ...]) -> QualityBounds | None:
    """Read what an engine is measured on, before anything is built."""
    if path is None:
        if specs:
            raise OptionError("--min-quality needs --quality, the file with the tasks")
        return None
    tasks = read_tasks(path)
    return QualityBounds(tasks, read_bounds(specs, tasks))


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call of `build`: what is read and written, and how.

    Attributes:
        target: the target as the options change it.
    """

    program: Path
    out: Path
    checkpoint: str | None
    options: BuildOptions
    target: TargetConfig
    force: bool
    dry_run: bool
    stages: Stages

    def check_vacant(self) -> None:
        """Refuse a place that is taken."""
        check_vacant(self.out, force=self.force, marker=MANIFEST)

    def result(self, target: TargetConfig, limits: Limits) -> BuildResult:
        """Return what every backend has a word for."""
        return BuildResult(
            path=self.out,
            target=target.name,
            backend=target.backend,
            sms=target.sms,
            precision=target.precision,
            formats=target.formats,
            limits=limits,
            dry_run=self.dry_run,
            seconds={stage: round(value, 3) for stage, value in self.stages.seconds.items()},
        )


def _build_cpu(call: _Call) -> BuildResult:
    """Build for a CPU. A repository is downloaded once its headers say that it can be built."""
    checkpoint, target, stages = call.checkpoint, call.target, call.stages
    if checkpoint is None:
        raise TargetError(f"target {target.name} keeps the weights in the engine; pass --checkpoint FOLDER")
    for graph in load_program(call.program).graphs.values():  # what is odd is said before torch is imported
        read_graph(call.program, graph)
    from_hub = parse_repo(checkpoint) is not None
    if not from_hub:
        ModelConfig.load(Path(checkpoint))
        check_weight_files(Path(checkpoint))
    if call.dry_run or from_hub:
        from seekforge.exporter.builder.onnxruntime.build import check  # brings torch, which GPU builds do without

        stages("read program and checkpoint")
        with headers(checkpoint, say=stages) as folder:
            checked = check(call.program, call.out, target=target, checkpoint_folder=folder, options=call.options)
        call.check_vacant()
        if call.dry_run:
            stages.done()
            return replace(
                call.result(target, checked.limits),
                layers=checked.program.layer_range,
                weight_bytes=checked.weight_bytes,
                disk_free_bytes=checked.free_bytes,
                warning=checked.warning or None,
            )
    if from_hub:
        stages(f"download {checkpoint}")
    folder = resolve(checkpoint, quiet=stages.quiet)
    ModelConfig.load(folder)
    from seekforge.exporter.builder.onnxruntime.build import build as build_for_cpu

    built = build_for_cpu(
        call.program,
        call.out,
        target=target,
        checkpoint_folder=folder,
        options=call.options,
        force=call.force,
        progress=stages,
    )
    stages.done()
    return replace(
        call.result(target, built.manifest.limits),
        precision=str(built.manifest.build["precision"]),
        manifest=built.manifest,
        num_nodes=built.num_nodes,
        weight_bytes=built.weight_bytes,
    )


def _build_gpu(call: _Call) -> BuildResult:
    """Build for a GPU, or check that it can be."""
    from seekforge.exporter.builder.tensorrt.build import build_gpu
    from seekforge.exporter.builder.tensorrt.check import check

    options, stages = call.options, call.stages
    stages("read program and check")
    inputs = _open_inputs(call.program, call.checkpoint, stages, joins=not options.taps)
    checked = check(inputs, call.target, options)
    if not call.dry_run:
        manifest = build_gpu(inputs, checked, call.out, options=options, force=call.force, progress=stages)
        stages.done()
        result = call.result(checked.target, manifest.limits)
        return replace(result, sms=tuple(manifest.target.sms), manifest=manifest)
    call.check_vacant()
    missing = missing_here(inputs, checked, options)
    stages.done()
    return replace(
        call.result(checked.target, checked.limits),
        products=checked.target.products,
        kv_cache_dtype=checked.target.kv_format,
        fp8_storage=checked.how.fp8_storage,
        plugins={op: checked.num_nodes[op] for op in checked.plugins},
        inlined={op: checked.num_nodes[op] for op in checked.inlined},
        device_bytes=checked.device_bytes,
        oversize=checked.oversize,
        profiles=tuple(checked.target.profiles),
        missing=tuple(missing),
    )


def _open_inputs(program: Path, checkpoint: str | None, stages: Stages, *, joins: bool) -> Inputs:
    """Open a program and the headers of its checkpoint; where a repository is kept is not remembered."""
    from seekforge.exporter.builder.tensorrt.check import open_inputs

    if checkpoint is None:
        return open_inputs(program, None, joins=joins)
    with headers(checkpoint, say=stages) as folder:
        inputs = open_inputs(program, folder, joins=joins)
    if parse_repo(checkpoint) is None:
        return inputs
    return replace(inputs, weights=inputs.weights.model_copy(update={"path": None}))
