"""How a canonical program is made concrete for a target; function bodies are generated for one of these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from seekforge.common.errors import ProgramError


@dataclass(frozen=True)
class Specialization:
    """The choices that `build` makes per target.

    Attributes:
        activations: dtype of activations, and of weights that are bf16 in the checkpoint.
        fp8_storage: FP8 weights as float8 tensors, as int8 tensors holding the same bytes, or `kept`: no FP8 but the
            values that the checkpoint has, in the dtype of activations, with scales of one.
        kv_format: dtype and layout of the caches.
        bodies: `ort` decompositions may use exact-work forms that only ONNX Runtime takes (NonZero, scatter
            with a reduction, float8 casts); `trt` ones use only what TensorRT's parser and builder take.
    """

    activations: Literal["f32", "bf16"]
    fp8_storage: Literal["float8", "int8", "kept"]
    kv_format: Literal["f32", "bf16", "fp8_ds"]
    bodies: Literal["ort", "trt"]

    def __post_init__(self) -> None:
        if self.kv_format == "f32" and self.activations == "bf16":
            raise ProgramError("kv_format f32 with bf16 activations is not supported; use bf16 or fp8_ds")

    @property
    def fp8_dtype(self) -> str:
        """Element type of FP8 weight inputs."""
        if self.fp8_storage == "kept":
            return self.activations
        return "f8e4m3" if self.fp8_storage == "float8" else "i8"


#: What a canonical program is written in: the form that `export` writes and `build` starts from.
CANONICAL = Specialization(activations="bf16", fp8_storage="float8", kv_format="bf16", bodies="ort")
#: The same of a program that keeps the checkpoint's values for its weights.
CANONICAL_KEPT = replace(CANONICAL, fp8_storage="kept")
