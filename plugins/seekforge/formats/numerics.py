"""The named numeric settings of a program (spec §3.3, §3.6, §5): what is quantized, and where."""

from __future__ import annotations

from typing import Literal

from seekforge.common.errors import ConfigError
from seekforge.common.records import Record, RecordError

#: Elements of K that share one scale, of weights (with as many rows) and of activations (spec §5).
FP8_BLOCK = 128

Activations = Literal["f32", "bf16"]


class Numerics(Record):
    """Which roundings a program makes beside those of its activation dtype.

    Attributes:
        name: how a parity line and a manifest call this setting.
        act_quant: FP8 linears quantize their input to e4m3 in blocks of 128 with UE8M0 scales, or do not.
        kv_fp8: the latent is quantized and dequantized before it is cached.
        hadamard: indexer queries and keys are rotated by a 128-point Hadamard matrix.
        indexer_fp8: indexer queries and keys are quantized to FP8.
        activations: dtype of activations. A canonical program is always traced with bf16 types; this is
            what it computes in when nothing else is asked at build.
    """

    name: str
    act_quant: Literal["ue8m0", "none"]
    kv_fp8: bool
    hadamard: bool
    indexer_fp8: bool
    activations: Activations

    @property
    def quantizes_activations(self) -> bool:
        """Whether products round their inputs to FP8; weights are then FP8 blocks too."""
        return self.act_quant != "none"

    def rounds_like(self, other: Numerics) -> bool:
        """Whether both make the same roundings beside those of the activations' dtype."""
        return all(getattr(self, key) == getattr(other, key) for key in _ROUNDINGS)


#: What of a setting is a rounding of its own.
_ROUNDINGS = ("act_quant", "kv_fp8", "hadamard", "indexer_fp8")

#: The official reference numerics (HF demo of V3.2, spec §3.6 "Project rule").
FP8 = Numerics(name="fp8", act_quant="ue8m0", kv_fp8=True, hadamard=True, indexer_fp8=True, activations="bf16")
#: FP32 throughout, weights dequantized: the setting in which `transformers` is an oracle.
EXACT = Numerics(name="exact", act_quant="none", kv_fp8=False, hadamard=False, indexer_fp8=False, activations="f32")

#: BF16 activations and caches and no quantization: what a trainer in BF16 computes.
BF16 = Numerics(name="bf16", act_quant="none", kv_fp8=False, hadamard=False, indexer_fp8=False, activations="bf16")

NUMERICS = {setting.name: setting for setting in (FP8, EXACT, BF16)}


def numerics_from_dict(raw: dict[str, object]) -> Numerics:
    """Rebuild a setting from program.json.

    Raises:
        ConfigError: a field is missing or unknown.
    """
    try:
        return Numerics.model_validate(raw)
    except RecordError as error:
        raise ConfigError(f"numerics: {error}; export the program again") from None
