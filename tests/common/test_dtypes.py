"""The table of element types says what the libraries say."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from seekforge.common import dtypes


@pytest.mark.parametrize("name", dtypes.NUMPY)
def test_torch_knows_the_type(name: str) -> None:
    torch_dtype = getattr(torch, dtypes.TORCH[name])
    assert torch_dtype.itemsize == dtypes.itemsize(name)


@pytest.mark.parametrize("name", dtypes.ONNX)
def test_onnx_has_the_type_by_that_number_and_text(name: str) -> None:
    number = dtypes.ONNX[name]
    assert onnx.helper.tensor_dtype_to_np_dtype(number) == dtypes.NUMPY[name] and dtypes.FROM_ONNX[number] == name
    word = TensorProto.DataType.Name(number).lower()
    assert dtypes.ONNX_TYPES[name] == f"tensor({word})"


def test_types_of_checkpoints_alone_are_none_of_a_graph() -> None:
    assert dtypes.NUMPY.keys() - dtypes.ONNX.keys() == {"f16", "f8e8m0"}
    assert set(dtypes.FROM_TENSORRT.values()) <= dtypes.ONNX.keys()
    assert set(dtypes.FROM_TRITON.values()) <= dtypes.ONNX.keys()


def test_what_is_widened_keeps_every_value() -> None:
    for wide, narrow in ((wide, one) for wide, ones in dtypes.WIDENED_FROM.items() for one in ones):
        patterns = np.arange(256 ** dtypes.itemsize(narrow), dtype=np.dtype(f"u{dtypes.itemsize(narrow)}"))
        values = patterns.view(dtypes.NUMPY[narrow])
        widened = dtypes.widen(values, wide)
        with np.errstate(invalid="ignore"):  # a signaling NaN becomes a quiet one
            assert np.array_equal(widened.astype(np.float64), values.astype(np.float64), equal_nan=True), narrow
