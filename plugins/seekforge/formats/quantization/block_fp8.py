"""FP8 in 128×128 blocks: how a wider matrix becomes e4m3 values and power-of-two scales (spec §5.1). NumPy only."""

from __future__ import annotations

from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.formats.numerics import FP8_BLOCK

_FP8_MAX: Final = 448.0
_MIN_AMAX: Final = 1e-4


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight to e4m3 in 128×128 blocks with power-of-two scales (the rule of spec §5.1, per block).

    Args:
        weight: [N, K], f32 or bf16. The last block of an axis may be partial.

    Returns:
        float8_e4m3fn [N, K] and f32 scales [⌈N/128⌉, ⌈K/128⌉]; real = stored * scale.
    """
    stored = np.empty(weight.shape, NUMPY["f8e4m3"])
    scale = block_scales(weight)
    encode_into(weight, scale, stored)
    return stored, scale


def block_scales(weight: np.ndarray) -> np.ndarray:
    """Return the scales [⌈N/128⌉, ⌈K/128⌉] f32 of a weight [N, K] f32 or bf16, one block of rows at a time."""
    n, k = weight.shape
    rows, columns = -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)
    amax = np.zeros((rows, columns), np.float32)
    starts = np.arange(columns) * FP8_BLOCK
    for row in range(rows):
        block = weight[row * FP8_BLOCK : (row + 1) * FP8_BLOCK].astype(np.float32, copy=False)
        amax[row] = np.maximum.reduceat(np.abs(block).max(axis=0), starts)
    mantissa, exponent = np.frexp(np.maximum(amax, _MIN_AMAX) / np.float32(_FP8_MAX))
    # frexp gives a mantissa in [0.5, 1): only an exact power of two is one exponent lower
    return np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)


def encode_into(weight: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Write the e4m3 values of a weight [N, K] f32 or bf16 under its block scales into `out` [N, K] float8_e4m3fn."""
    k = weight.shape[1]
    for row, block_scale in enumerate(scale):
        part = slice(row * FP8_BLOCK, (row + 1) * FP8_BLOCK)
        along_k = np.repeat(block_scale, FP8_BLOCK)[:k]
        scaled = weight[part].astype(np.float32, copy=False) / along_k
        out[part] = np.clip(scaled, -_FP8_MAX, _FP8_MAX).astype(NUMPY["f8e4m3"])
