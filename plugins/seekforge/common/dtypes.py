"""One short name per element type, and what NumPy, safetensors and ONNX call it."""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np

#: our name -> NumPy dtype. float8 and bfloat16 come from ml_dtypes.
NUMPY: Final[dict[str, np.dtype]] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
}

#: safetensors header word -> our name. Only what a DeepSeek-V3.2 checkpoint may hold.
SAFETENSORS: Final[dict[str, str]] = {
    "F32": "f32",
    "BF16": "bf16",
    "F8_E4M3": "f8e4m3",
    "F16": "f16",
    "F8_E8M0": "f8e8m0",
}

#: our name -> narrower types whose every value it has: a tensor may be stored in one of them and is widened when read.
WIDENED_FROM: Final[dict[str, frozenset[str]]] = {"f32": frozenset({"bf16", "f16", "f8e8m0"})}

#: our name -> onnx.TensorProto.DataType number (numbers are part of the ONNX standard; no onnx import).
ONNX: Final[dict[str, int]] = {
    "f32": 1,
    "u8": 2,
    "i8": 3,
    "i32": 6,
    "i64": 7,
    "bool": 9,
    "bf16": 16,
    "f8e4m3": 17,
}
FROM_ONNX: Final[dict[int, str]] = {number: name for name, number in ONNX.items()}


def is_stored_as(stored: str, wanted: str) -> bool:
    """Whether every value of the type `found` is one of the type `wanted`."""
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
