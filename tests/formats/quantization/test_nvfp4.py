"""NVFP4 against ml_dtypes' element types, and the error that its two levels of scales leave."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.formats.quantization.nvfp4 import (
    BITS,
    BLOCK,
    dequantize,
    e2m1,
    from_rows,
    quantize,
    round_trip,
    row_bytes,
    rows_of_fp8,
    second_scales,
    to_rows,
)


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


def test_rows_are_codes_in_pairs_and_scales_behind_them() -> None:
    x = np.array([[6, -3, 0.5, 0] * 4, [0] * 15 + [1.5]], np.float32)
    rows = to_rows(quantize(x, tensor_scale=1.0))
    assert rows.dtype == np.int8 and rows.shape == (2, row_bytes(16)) == (2, 9)
    assert rows.view(np.uint8)[0].tolist() == [0xD7, 0x01] * 4 + [0x38]  # 6 and −3 are 7 and 13, 1.0 is 0x38
    assert (from_rows(rows) == round_trip(x, tensor_scale=1.0)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 9))
def test_rows_of_fp8_values_are_never_worse_than_under_the_largest_alone(seed: int, n: int, blocks: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (n, blocks * BLOCK), np.uint8)
    raw[(raw & 0x7F) == 0x7F] ^= 1  # no NaN
    values = raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    rows = rows_of_fp8(raw.view(ml_dtypes.float8_e4m3fn))
    back = from_rows(rows) * second_scales(np.ones(1, np.float32))
    most = np.abs(values).reshape(n, blocks, BLOCK).max(-1)
    plain = round_trip_under(values, most)

    def squared(error: np.ndarray) -> np.ndarray:
        return np.square(error).reshape(n, blocks, BLOCK).sum(-1)

    # the widest gap of e2m1 is from 4 to 6, which is the largest: half of it is a sixth
    assert (np.abs(plain - values) <= np.repeat(most, BLOCK, -1) / 6 * 1.0001).all()
    assert (squared(back - values) <= squared(plain - values) * (1 + 1e-5)).all()


def round_trip_under(values: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return what is left of values [N, K] under scales of their blocks' largest magnitudes over 6 alone."""
    step = np.repeat(most, BLOCK, -1) / np.float32(6)
    codes = e2m1(np.divide(values, step, out=np.zeros_like(values), where=step > 0)).view(ml_dtypes.float4_e2m1fn)
    return codes.astype(np.float32) * step


def test_rows_of_fp8_values_keep_three_quarters_of_the_squared_error_of_the_largest_alone() -> None:
    values = np.random.default_rng(3).standard_normal((64, 512)).astype(np.float32) * 100
    stored = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    values = stored.astype(np.float32)
    most = np.abs(values).reshape(64, -1, BLOCK).max(-1)
    error = np.square(from_rows(rows_of_fp8(stored)) / 6 - values).sum()
    plain = np.square(round_trip_under(values, most) - values).sum()
    assert 0.70 < error / plain < 0.82, error / plain


def test_what_nvfp4_can_hold_of_fp8_values_comes_back_as_it_was() -> None:
    codes = np.tile(np.array([7, 5, 3, 1, 15, 9, 0, 7] * 2, np.uint8), (6, 4))
    scales = np.repeat(np.array([[1, 2, 4, 8]], np.float32), 6, 0)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * np.repeat(scales, BLOCK, -1)
    back = from_rows(rows_of_fp8(values.astype(ml_dtypes.float8_e4m3fn))) / np.float32(6)
    assert (back == values).all()
    assert not from_rows(rows_of_fp8(np.zeros((2, 32), ml_dtypes.float8_e4m3fn))).any()
