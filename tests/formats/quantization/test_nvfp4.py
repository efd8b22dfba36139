"""NVFP4 against ml_dtypes' element types, and the error that its two levels of scales leave."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from seekforge.formats.quantization.nvfp4 import BITS, BLOCK, dequantize, e2m1, quantize, round_trip


def test_every_code_is_the_value_that_ml_dtypes_has_for_it() -> None:
    codes = np.arange(16, dtype=np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert e2m1(values).tolist() == codes.tolist()


def test_values_are_rounded_as_ml_dtypes_rounds_them() -> None:
    rng = np.random.default_rng(0)
    borders = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    near = [np.nextafter(borders, np.float32(end), dtype=np.float32) for end in (-np.inf, np.inf)]
    x = np.concatenate([borders, *near, rng.uniform(0, 6, 4000).astype(np.float32)])
    x = np.concatenate([x, -x])
    assert (e2m1(x) == x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)).all()
    assert e2m1(np.array([5.5, 6.0, 7.0, 1e30, -9.0], np.float32)).tolist() == [7, 7, 7, 7, 15]


def test_what_nvfp4_can_hold_comes_back_as_it_was() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (5, 64), np.uint8)
    codes[:, ::BLOCK] = 7  # each block reaches 6, so that its scale is found again
    scales = rng.choice(np.array([0.5, 1, 3.5, 448], np.float32), (5, 4))
    scales[0, 0] = 448
    x = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * np.repeat(scales, BLOCK, -1) * np.float32(2**-9)
    stored = quantize(x)
    assert stored.tensor_scale == np.float32(2**-9)
    assert (stored.block_scales.astype(np.float32) == scales).all() and (stored.codes == codes).all()
    assert (dequantize(stored) == x).all()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
def test_the_error_is_that_of_four_bits_at_every_size(size: float) -> None:
    x = (np.random.default_rng(2).standard_normal((32, 256)) * size).astype(np.float32)
    error = round_trip(x) - x
    relative = float(np.sqrt(np.mean(np.square(error / size))))
    assert 0.08 < relative < 0.11, relative
    assert BITS == 4.5


def test_a_block_beside_a_far_larger_one_is_zero_and_zeros_stay() -> None:
    x = np.zeros((1, 3 * BLOCK), np.float32)
    x[0, 0], x[0, BLOCK] = 1.0, 1e-9
    back = round_trip(x)
    assert back[0, 0] == pytest.approx(1.0, rel=1e-6) and not back[0, BLOCK:].any()
    assert not round_trip(np.zeros((2, BLOCK), np.float32)).any()


def test_a_scale_of_the_tensor_that_is_too_small_cuts_off() -> None:
    x = np.full((1, BLOCK), 6.0 * 448 * 2, np.float32)
    assert round_trip(x, tensor_scale=1.0).max() == 6.0 * 448
