"""Build targets: data files of `configs/targets/` or of the user, checked, and changed by `--set a.b=c`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from seekforge.common.configs import known, load_yaml
from seekforge.common.errors import TargetError
from seekforge.common.records import Positive, Record, RecordError, above_zero
from seekforge.common.yaml_file import YamlError, YamlNumberError, parse_yaml, read_yaml
from seekforge.formats.engine.manifest import Limits

#: Far above any hardware, and what is computed from it stays finite.
Rate = Annotated[float, above_zero(1e9)]

Precision = Literal["f32", "int8", "int4", "bf16", "fp8", "nvfp4"]
CPU_PRECISIONS = ("f32", "int8", "int4")
GPU_PRECISIONS = ("bf16", "fp8", "nvfp4")
#: Values along K that may share a scale, where weights are codes.
WeightBlockSize = Literal[32, 64, 128]

#: SMs that TensorRT-RTX compiles for, and those of data-center GPUs that need TensorRT.
RTX_SMS = (80, 86, 89, 120, 121)
TENSORRT_SMS = (80, 86, 89, 90, 100, 103, 120, 121)
#: The first SM with FP8 matrix units, and the first whose kernels take experts in NVFP4.
FP8_SM, NVFP4_SM = 89, 100


class Gpu(Record):
    """What the GPU has. Rates are dense, per second; None where the hardware lacks the type.

    `link_gb_s` is what it sends to the other GPUs of its server, in one direction; None where nobody says.

    Attributes:
        num_sms: how many multiprocessors it has.
        clock_mhz: their clock at which the rates hold.
    """

    memory_gib: Rate
    bandwidth_gb_s: Rate
    bf16_tflops: Rate
    fp8_tflops: Rate | None
    fp4_tflops: Rate | None
    num_sms: Positive
    clock_mhz: Rate
    link_gb_s: Rate | None = None


class Profile(Record):
    """Shapes that one optimization profile covers; the limits of an engine cut it.

    Attributes:
        max_batch_size, max_query_len: largest number of sequences and of new tokens of each.
        typical_*: what the compiler optimizes for.
    """

    max_batch_size: Positive
    max_query_len: Positive
    typical_batch_size: Positive
    typical_query_len: Positive
    typical_context: Positive


class TargetConfig(Record):
    """One target: which backend compiles for it, in which formats, with which default limits.

    Attributes:
        precision: the precision of matrix products: f32 on a CPU, or f32 with int8 or int4 weights; fp8 means FP8
            products from SM89 on, and FP8 weights with BF16 products before; nvfp4 the same with experts in NVFP4.
        also: other SMs that the same plan shall run on (tensorrt-rtx).
        provider: onnxruntime: cuda where it runs the engine on a GPU, whichever that is.
        weight_block_size: CPU: values along K that share a scale, of weights that are codes.
        weights: CPU: pattern -> precision of the weights that it names; of several, the last decides. A pattern is of
            names of checkpoint tensors or of kinds, such as `lm_head` or `model.layers.0.*`.
    """

    name: str
    title: str = ""
    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    sm: int | None
    also: tuple[int, ...] = ()
    gpu: Gpu | None = None
    activations: Literal["f32", "bf16"]
    precision: Precision
    kv_format: Literal["f32", "bf16", "fp8_ds"]
    limits: Limits
    profiles: dict[str, Profile] = field(default_factory=dict)
    provider: Literal["cuda"] | None = None
    weight_block_size: WeightBlockSize = 32
    weights: dict[str, Literal["f32", "int8", "int4"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend == "onnxruntime":
            if self.sm is not None or self.gpu is not None:
                raise RecordError("sm and gpu belong to a GPU backend, expected null with onnxruntime")
            if self.precision not in CPU_PRECISIONS:
                raise RecordError(f"precision {self.precision} is for GPUs; a CPU knows {', '.join(CPU_PRECISIONS)}")
            if self.provider == "cuda" and self.has_codes:
                raise RecordError(
                    f"{self.formats} are for CPUs: ONNX Runtime's CUDA provider has no QMoE for f32 inputs, and its "
                    "MatMulNBits does not round them to int8; take precision f32"
                )
            return
        if self.provider is not None:
            raise RecordError("provider is for onnxruntime")
        if self.weights or self.weight_block_size != 32:
            raise RecordError("weights and weight_block_size are for CPUs: a GPU engine takes those of the checkpoint")
        if self.sm is None or self.gpu is None or not self.profiles:
            raise RecordError(f"sm, gpu and profiles are needed with backend {self.backend}")
        allowed = RTX_SMS if self.backend == "tensorrt-rtx" else TENSORRT_SMS
        for sm in (self.sm, *self.also):
            if sm not in allowed:
                raise RecordError(
                    f"sm {sm} is not one that {self.backend} compiles for ({', '.join(map(str, allowed))})"
                )
        if self.also and self.backend != "tensorrt-rtx":
            raise RecordError("also is for tensorrt-rtx; a TensorRT plan runs on one SM")
        if self.activations != "bf16" or self.precision in CPU_PRECISIONS or self.kv_format == "f32":
            raise RecordError(
                "a GPU target computes in bf16: activations bf16, precision bf16, fp8 or nvfp4, kv_format not f32"
            )
        if self.nvfp4_experts and min(self.sms) < NVFP4_SM:
            raise RecordError(
                f"precision nvfp4 is for SMs from {NVFP4_SM} on (Blackwell), and this is for sm {min(self.sms)}; take "
                "precision fp8"
            )

    @property
    def sms(self) -> tuple[int, ...]:
        """All SMs that the plan shall run on, ascending; none on a CPU."""
        return () if self.sm is None else tuple(sorted({self.sm, *self.also}))

    @property
    def has_fp8(self) -> bool:
        """Whether every SM multiplies in FP8."""
        return bool(self.sms) and min(self.sms) >= FP8_SM

    @property
    def products(self) -> Precision:
        """The precision in which products of FP8 weights run: fp8 where it was asked and the hardware has it."""
        if self.nvfp4_experts:
            return "fp8"
        return "bf16" if self.precision == "fp8" and not self.has_fp8 else self.precision

    @property
    def nvfp4_experts(self) -> bool:
        """Whether a GPU engine has its experts in NVFP4, whose products are BF16; other FP8 weights stay FP8."""
        return self.precision == "nvfp4"

    @property
    def has_codes(self) -> bool:
        """Whether any weight of a CPU engine may be codes."""
        return any(one in ("int8", "int4") for one in (self.precision, *self.weights.values()))

    @property
    def formats(self) -> str:
        """Weights and products in words; weights of a GPU engine are those of the checkpoint, FP8."""
        if self.backend == "onnxruntime":
            blocks = f" in blocks of {self.weight_block_size}" if self.has_codes else ""
            others = f" ({', '.join(f'{name} {one}' for name, one in self.weights.items())})" if self.weights else ""
            return f"{self.precision} weights{others}{blocks}"
        if self.nvfp4_experts:
            return "experts in NVFP4 with BF16 products, other weights in FP8 with FP8 products"
        return f"FP8 weights, {self.products.upper()} products"

    def changed(self, settings: Sequence[str]) -> TargetConfig:
        """Return the target with changes such as `limits.max_batch_size=8`; see `load_target`.

        Raises:
            TargetError: a change does not fit.
        """
        raw = self.model_dump(mode="json")
        for setting in settings:
            _apply(raw, setting)
        return _validated(raw, f"target {self.name}")


def _validated(raw: dict[str, Any], origin: str) -> TargetConfig:
    try:
        return TargetConfig.model_validate(raw)
    except RecordError as error:
        raise TargetError(f"{origin}: {error}") from None


def load_target(name: str, settings: Sequence[str] = ()) -> TargetConfig:
    """Return a target.

    Args:
        name: the name of a file in configs/targets, or the path of a YAML file.
        settings: changes such as `limits.max_batch_size=8`, applied in order. With a precision as the value and no key
            of a target in front, `lm_head=f32`, it is one of `weights`.

    Raises:
        TargetError: unknown (the message lists the known ones), its file is malformed, or a change does not fit.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            raw = read_yaml(path)
        except OSError as error:
            raise TargetError(f"{path}: cannot be read ({error.strerror})") from None
        except YamlNumberError as error:
            raise TargetError(f"{path}: {error}") from None
        except YamlError as error:
            raise TargetError(f"{path}: not valid YAML ({error})") from None
        origin = str(path)
    else:
        raw = load_yaml("targets", name)
        origin = f"configs/targets/{name}.yaml"
        if raw is None:
            names = known("targets")
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TargetError(
                f"unknown target {name!r}, expected one of: {', '.join(names)}, or the path of a .yaml file{hint}"
            )
    if not isinstance(raw, dict):
        what = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise TargetError(f"{origin}: holds {what}, expected keys such as backend and limits")
    for setting in settings:
        _apply(raw, setting)
    return _validated(raw, origin)


def limits_named(settings: Sequence[str]) -> frozenset[str]:
    """Return the limits that changes such as `limits.max_batch_size=8` name: what a user wants, and no default."""
    names: set[str] = set()
    for setting in settings:
        first, *rest = setting.partition("=")[0].split(".")
        if first == "limits":
            names.update(rest or Limits.model_fields)
    return frozenset(names)


def all_targets() -> list[TargetConfig]:
    """Return every target of configs/targets, CPU first, then by SM and memory."""
    targets = [load_target(name) for name in known("targets")]
    return sorted(targets, key=lambda t: (t.sm or 0, t.gpu.memory_gib if t.gpu else 0))


def _apply(raw: dict[str, Any], setting: str) -> None:
    """Write `a.b=c` into nested keys; the value is YAML."""
    path, equals, text = setting.partition("=")
    keys = path.split(".")
    if keys[0] not in TargetConfig.model_fields and text.strip("\"'") in CPU_PRECISIONS and path:
        keys = ["weights", path]
        raw.setdefault("weights", {})
    if not equals or not all(keys):
        raise TargetError(f"--set {setting!r}: expected KEY=VALUE with dots, such as limits.max_batch_size=8")
    place: Any = raw
    for depth, key in enumerate(keys[:-1]):
        inner = place.get(key)
        if not isinstance(inner, dict):
            groups = [name for name, value in place.items() if isinstance(value, dict)]
            name = ".".join(keys[: depth + 1])
            hint = f"known: {', '.join(groups or place)}" if inner is None else f"pass --set {name}=VALUE"
            raise TargetError(f"--set {setting!r}: {name!r} is no group of keys; {hint}")
        place = inner
    try:
        place[keys[-1]] = parse_yaml(text)
    except YamlNumberError as error:
        raise TargetError(f"--set {setting!r}: key {path!r}: {error.problem}") from None
    except YamlError as error:
        raise TargetError(f"--set {setting!r}: {text!r} is not valid YAML ({error})") from None
