"""The reference of `BlockFp8Linear` against the block formula of spec §5, written independently in NumPy f64."""

import math

import ml_dtypes
import numpy as np
import pytest

from seekforge.plugins.testing import Case, cases, max_error, to_numpy, to_torch


def quantize_block(block: np.ndarray) -> tuple[np.ndarray, float]:
    p = np.float32(max(float(np.abs(block).max()), np.float32(1e-4))) * np.float32(1 / 448)
    mantissa, exponent = math.frexp(float(p))  # p = mantissa · 2^exponent, mantissa in [0.5, 1)
    scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
    q = np.clip(block.astype(np.float64) / scale, -448, 448).astype(np.float32)
    return q.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), scale


def naive(x: np.ndarray, weight: np.ndarray, weight_scale: np.ndarray, act_quant: str) -> np.ndarray:
    out = np.zeros((x.shape[0], weight.shape[0]))
    for m, row in enumerate(x):
        for kb in range(x.shape[1] // 128):
            part = slice(128 * kb, 128 * kb + 128)
            q, scale = quantize_block(row[part]) if act_quant == "ue8m0" else (row[part].astype(np.float64), 1.0)
            dots = weight[:, part].astype(np.float64) @ q
            for n in range(weight.shape[0]):
                out[m, n] += dots[n] * scale * weight_scale[n // 128, kb]
    return out


@pytest.mark.parametrize("case", cases("BlockFp8Linear"), ids=str)
def test_reference_is_the_block_formula(case: Case) -> None:
    x, weight, scale = (to_numpy(t) for t in case.inputs)
    want = naive(x.reshape(-1, x.shape[-1]), weight.astype(np.float32), scale, case.attrs["act_quant"])
    want = to_torch(want.reshape(*x.shape[:-1], -1))
    assert max_error(case.expected()[0], want) < 2e-6


def test_bf16_result_is_rounded_once() -> None:
    case = cases("BlockFp8Linear")[2]
    x, weight, scale = case.inputs
    wide = Case(case.op, "", (x.bfloat16().float(), weight, scale), case.attrs).expected()[0]
    narrow = Case(case.op, "", (x.bfloat16(), weight, scale), case.attrs).expected()[0]
    assert (wide.bfloat16() == narrow).all()
