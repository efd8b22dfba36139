"""What a build may be told, for every backend: names, types and defaults of its options.

`seekforge build` and `seekforge.build` take these options by the same names and with the defaults of this module; a
backend gets them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Literal

from seekforge.common.errors import TargetError
from seekforge.formats.quality import QualityTasks
from seekforge.formats.targets import (
    CPU_PRECISIONS,
    GPU_PRECISIONS,
    RTX_SMS,
    Precision,
    TargetConfig,
    WeightBlockSize,
    limits_named,
    load_target,
)

PluginChoice = Literal["auto", "all", "none"]
OptimizationLevel = Literal[0, 1, 2, 3, 4, 5]
#: The limits of an engine that are options of their own.
_LIMITS: Final = ("max_batch_size", "max_model_len", "max_num_batched_tokens")
#: Layers of one plan where nothing else is said.
LAYERS_PER_ENGINE: Final = 1


@dataclass(frozen=True)
class CompilerOptions:
    """What TensorRT's compiler is told beside the graph.

    Attributes:
        workspace_bytes: most scratch memory of one layer; None leaves it to the library.
        optimization_level: the level of the library's search; None takes the library's default.
        timing_cache: file of measured tactics to read and write (TensorRT alone).
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TensorRtOptions:
    """Options that only builds for a GPU know.

    Attributes:
        kv_cache_dtype: format of the caches; None takes the target's.
        sm: other SMs that the plan shall run on (tensorrt-rtx).
        plugins: which operators become plugins: all, none (inlined everywhere), or auto: those whose limits the model
            keeps.
        workspace: most scratch memory of one layer, in bytes; None leaves it to the library.
        timing_cache: file of measured tactics (tensorrt).
        builder_optimization_level: the level of the library's search; None takes the library's default.
        layers_per_engine: most layers of one plan; None: one, or all of them where the engine shows its taps.
        kernels: compile the kernels of the plugins into the engine; without, it can be looked at but not run.
        providers: who else than Triton provides them, `OPERATOR=PROVIDER` (`plugins.kernels.providers`).
        allow_oversize: build although it will not fit; such an engine is marked and does not load.
    """

    kv_cache_dtype: Literal["fp8_ds", "bf16"] | None = None
    sm: tuple[int, ...] = ()
    plugins: PluginChoice = "auto"
    workspace: int | None = None
    timing_cache: Path | None = None
    builder_optimization_level: OptimizationLevel | None = None
    layers_per_engine: int | None = None
    kernels: bool = True
    providers: tuple[str, ...] = ()
    allow_oversize: bool = False

    @property
    def compiler(self) -> CompilerOptions:
        """The part that the compiler is told."""
        return CompilerOptions(self.workspace, self.builder_optimization_level, self.timing_cache)


@dataclass(frozen=True)
class QualityBounds:
    """What an engine is measured on before it is kept.

    Attributes:
        tasks: the tasks.
        bounds: task -> smallest score, or largest perplexity, that is allowed.
    """

    tasks: QualityTasks
    bounds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """All options of a build beside what it reads and writes. None leaves a value to the target.

    Attributes:
        settings: changes of keys of the target, such as `limits.max_batch_size=8`.
        max_batch_size: most sequences of a step.
        max_model_len: longest sequence, prompt and answer together.
        max_num_batched_tokens: most tokens of a step.
        precision: CPU: of the weights; GPU: of products of FP8 weights, or nvfp4: as fp8, with experts in NVFP4.
        weight_block_size: CPU: values along K that share a scale, of weights that are codes.
        taps: let the engine show the tensors inside each layer.
        quality: CPU: what it is measured on; None: nothing is.
        tensorrt: what only builds for a GPU know.
    """

    settings: tuple[str, ...] = ()
    max_batch_size: int | None = None
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    precision: Precision | None = None
    weight_block_size: WeightBlockSize | None = None
    taps: bool = False
    quality: QualityBounds | None = None
    tensorrt: TensorRtOptions = field(default_factory=TensorRtOptions)

    @property
    def named_limits(self) -> frozenset[str]:
        """The limits that the user named; others are defaults, which are cut to what the model can do."""
        return limits_named(self.settings) | {name for name in _LIMITS if getattr(self, name) is not None}

    @property
    def layers_per_plan(self) -> int | None:
        """Most layers of one plan; None: all. Taps are shown by an engine of one plan."""
        return self.tensorrt.layers_per_engine or (None if self.taps else LAYERS_PER_ENGINE)

    def target(self, name: str) -> TargetConfig:
        """Return a target as the options change it.

        Args:
            name: a name of configs/targets, or the path of a YAML file.

        Raises:
            TargetError: the target is unknown, or does not take one of the options.
        """
        target = load_target(name, self.settings)
        changes = [f"limits.{limit}={value}" for limit in _LIMITS if (value := getattr(self, limit)) is not None]
        if self.precision is not None:
            _check_precision(target, self.precision)
            changes.append(f"precision={self.precision}")
        if self.weight_block_size is not None:
            if target.backend != "onnxruntime":
                raise TargetError(
                    f"--weight-block-size is for CPUs, target {target.name} takes the checkpoint's weights"
                )
            changes.append(f"weight_block_size={self.weight_block_size}")
        target = target.changed(changes)
        if target.backend == "onnxruntime":
            self._check_cpu(target)
            return target
        return target.changed(self._gpu_changes(target))

    def _check_cpu(self, target: TargetConfig) -> None:
        for option in fields(TensorRtOptions):
            if getattr(self.tensorrt, option.name) != option.default:
                name = {"kernels": "no-kernels", "providers": "kernels"}.get(option.name, option.name)
                name = name.replace("_", "-")
                raise TargetError(f"--{name} is for GPU targets, target {target.name} does not know it")

    def _gpu_changes(self, target: TargetConfig) -> list[str]:
        """Return what the options of GPUs change of a target."""
        gpu = self.tensorrt
        if self.taps and gpu.layers_per_engine is not None:
            raise TargetError("--taps shows the layers of one plan; leave out --layers-per-engine")
        if gpu.timing_cache is not None and target.backend == "tensorrt-rtx":
            raise TargetError("--timing-cache is for tensorrt; tensorrt-rtx measures on the GPU that runs the engine")
        if self.quality is not None:
            raise TargetError(
                f"--quality runs the engine once it is built, and target {target.name} is a GPU; measure it where that "
                "GPU is: seekforge parity ENGINE --checkpoint CHECKPOINT --quality FILE"
            )
        changes = [] if gpu.kv_cache_dtype is None else [f"kv_format={gpu.kv_cache_dtype}"]
        if gpu.sm:
            if target.backend == "tensorrt":
                raise TargetError(
                    f"--sm {gpu.sm[0]} is for tensorrt-rtx; target {target.name} is built by TensorRT, whose "
                    f"plans run on one SM, here sm{target.sm}: pass the target of the other GPU "
                    "('seekforge targets' lists them)"
                )
            wrong = next((sm for sm in gpu.sm if sm not in RTX_SMS), None)
            if wrong is not None:
                known = ", ".join(map(str, RTX_SMS))
                raise TargetError(f"--sm {wrong} is not one that tensorrt-rtx compiles for ({known})")
            changes.append(f"also={[*target.also, *gpu.sm]}")
        return changes


#: What holds where nothing is said: the command line and the Python function read their defaults here.
DEFAULTS: Final = BuildOptions()


def _check_precision(target: TargetConfig, precision: Precision) -> None:
    on_cpu = target.backend == "onnxruntime"
    if on_cpu and precision not in CPU_PRECISIONS:
        raise TargetError(f"--precision {precision} is for GPUs; a CPU knows {', '.join(CPU_PRECISIONS)}")
    if not on_cpu and precision not in GPU_PRECISIONS:
        known = f"{', '.join(GPU_PRECISIONS[:-1])} or {GPU_PRECISIONS[-1]}"
        raise TargetError(f"--precision {precision} is for CPUs; target {target.name} takes {known}")
