"""The element types: one short name for each, and what every library calls it. None of them but NumPy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class _Words:
    """What a type is called; "" where no tensor of it meets the library. What a graph may hold is what has a number in
    ONNX, and what a plugin may take is what has a name in TensorRT: other types are refused there.

    Attributes:
        numpy: NumPy's type; float8 and bfloat16 come from ml_dtypes.
        torch: attribute of `torch`.
        safetensors: word in the header of a file.
        onnx: number in onnx.TensorProto.DataType, which is part of the ONNX standard; 0: of checkpoints alone.
        onnx_type: ONNX's text, as in "tensor(float)", which ONNX Runtime writes too.
        tensorrt: name in trt.DataType.
        triton: pointer to it in a kernel's signature.
    """

    numpy: type
    torch: str
    safetensors: str
    onnx: int = 0
    onnx_type: str = ""
    tensorrt: str = ""
    triton: str = ""


_TABLE: Final[dict[str, _Words]] = {
    "f32": _Words(np.float32, "float32", "F32", 1, "float", "FLOAT", "*fp32"),
    "bf16": _Words(ml_dtypes.bfloat16, "bfloat16", "BF16", 16, "bfloat16", "BF16", "*bf16"),
    "f16": _Words(np.float16, "float16", "F16"),
    "f8e4m3": _Words(ml_dtypes.float8_e4m3fn, "float8_e4m3fn", "F8_E4M3", 17, "float8e4m3fn", "FP8", "*fp8e4nv"),
    "f8e8m0": _Words(ml_dtypes.float8_e8m0fnu, "float8_e8m0fnu", "F8_E8M0"),
    "i8": _Words(np.int8, "int8", "I8", 3, "int8", "INT8"),
    "u8": _Words(np.uint8, "uint8", "U8", 2, "uint8", triton="*u8"),
    "i32": _Words(np.int32, "int32", "I32", 6, "int32", "INT32", "*i32"),
    "i64": _Words(np.int64, "int64", "I64", 7, "int64", "INT64", "*i64"),
    "bool": _Words(np.bool_, "bool", "BOOL", 9, "bool"),
}

#: our name -> NumPy dtype.
NUMPY: Final[dict[str, np.dtype]] = {name: np.dtype(words.numpy) for name, words in _TABLE.items()}
#: our name -> attribute of `torch`.
TORCH: Final[dict[str, str]] = {name: words.torch for name, words in _TABLE.items()}
#: our name -> word in the header of a safetensors file.
SAFETENSORS: Final[dict[str, str]] = {name: words.safetensors for name, words in _TABLE.items()}
#: our name -> onnx.TensorProto.DataType number.
ONNX: Final[dict[str, int]] = {name: words.onnx for name, words in _TABLE.items() if words.onnx}
FROM_ONNX: Final[dict[int, str]] = {number: name for name, number in ONNX.items()}
#: our name -> how ONNX and ONNX Runtime write the type of a tensor.
ONNX_TYPES: Final[dict[str, str]] = {
    name: f"tensor({words.onnx_type})" for name, words in _TABLE.items() if words.onnx_type
}
#: our name -> name in trt.DataType.
TENSORRT: Final[dict[str, str]] = {name: words.tensorrt for name, words in _TABLE.items() if words.tensorrt}
FROM_TENSORRT: Final[dict[str, str]] = {word: name for name, word in TENSORRT.items()}
#: Triton's type of a pointer -> our name.
FROM_TRITON: Final[dict[str, str]] = {words.triton: name for name, words in _TABLE.items() if words.triton}

#: our name -> narrower types whose every value it has: a tensor may be stored in one of them and is widened when read.
WIDENED_FROM: Final[dict[str, frozenset[str]]] = {"f32": frozenset({"bf16", "f16", "f8e8m0"})}


def is_stored_as(stored: str, wanted: str) -> bool:
    """Whether every value of the type `stored` is one of the type `wanted`."""
    return stored == wanted or stored in WIDENED_FROM.get(wanted, ())


def widen(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return `array` itself where it has the type `dtype`, else its values in that type; nothing is rounded."""
    if array.dtype == NUMPY[dtype]:
        return array
    assert array.dtype in [NUMPY[name] for name in WIDENED_FROM.get(dtype, ())], (array.dtype, dtype)
    return array.astype(NUMPY[dtype])


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of `dtype`."""
    return NUMPY[dtype].itemsize
