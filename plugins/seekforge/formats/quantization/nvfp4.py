"""NVFP4: e2m1 values in blocks of 16 with an e4m3 scale each, and one f32 scale for the whole tensor. NumPy only.

real = value · block_scale · tensor_scale. The tensor's scale puts the largest block scale at 448, the largest e4m3;
a block's scale puts its largest magnitude at 6, the largest e2m1, and is rounded to e4m3 before values are divided.
Checkpoints hold such weights, which are read exactly; experts of an engine for a GPU can have them (`to_rows`); and it
is a reference form, which says what such weights or caches would cost.

Source: NVIDIA's description of NVFP4 (two-level scales, blocks of 16); TensorRT Model Optimizer, `NVFP4QTensor`.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import ml_dtypes
import numpy as np

#: Values that share a scale.
BLOCK: Final = 16
#: Largest e2m1 and e4m3 values.
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0
#: Scales of a block of FP8 values that are tried beside its largest magnitude, as steps of e4m3: of normal values these
#: take 0.24 off the squared error, every step from −4 to 8 takes 0.25.
_STEPS: Final = (-1, 4, 5)
#: FP8 values that are rounded at a time, so that what is made of them on the way stays in a core's cache.
_VALUES: Final = 1 << 16
#: Bits of a value with its part of the block's scale.
BITS: Final = 4 + 8 / BLOCK
#: The magnitudes of e2m1, by code, and the borders between them; a value on a border goes to the even code.
_MAGNITUDES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_BORDERS: Final = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
_SIGN: Final = 8


class Nvfp4(NamedTuple):
    """A quantized tensor.

    Attributes:
        codes: [..., K] uint8, the bits of e2m1: sign, exponent, mantissa.
        block_scales: [..., K / 16] e4m3.
        tensor_scale: f32.
    """

    codes: np.ndarray
    block_scales: np.ndarray
    tensor_scale: np.float32


def e2m1(values: np.ndarray) -> np.ndarray:
    """Return the codes of the nearest e2m1 values, ties to even; beyond ±6 the largest.

    Args:
        values: f32 of any shape, no NaN.
    """
    magnitude = np.abs(values)
    up = np.searchsorted(_BORDERS, magnitude, side="left").astype(np.uint8)
    ties = (up < len(_BORDERS)) & (magnitude == _BORDERS[np.minimum(up, len(_BORDERS) - 1)])
    up += (ties & (up % 2 == 1)).astype(np.uint8)
    return up | np.where(np.signbit(values), _SIGN, 0).astype(np.uint8)


def quantize(x: np.ndarray, tensor_scale: float | None = None) -> Nvfp4:
    """Quantize blocks of 16 along the last axis.

    Args:
        x: [..., K] f32, finite, K a multiple of 16.
        tensor_scale: the scale of the tensor; None takes it from the largest magnitude of `x`.
    """
    x = np.asarray(x, np.float32)
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(-1)
    if tensor_scale is None:
        tensor_scale = float(largest.max(initial=0)) / (E2M1_MAX * E4M3_MAX) or 1.0
    scale = np.float32(tensor_scale)
    wanted = np.minimum(largest / np.float32(E2M1_MAX) / scale, np.float32(E4M3_MAX))
    block_scales = wanted.astype(ml_dtypes.float8_e4m3fn)
    step = block_scales.astype(np.float32)[..., None] * scale
    # a block whose scale rounds to 0 is 0
    scaled = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
    return Nvfp4(e2m1(scaled).reshape(x.shape), block_scales, scale)


def pack(codes: np.ndarray) -> np.ndarray:
    """Return codes [..., K] two to a byte, [..., K / 2] uint8; the first of two is in the lower half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Return the codes [..., K] uint8 of bytes [..., K / 2] that hold two each."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed & 0xF
    codes[..., 1::2] = packed >> 4
    return codes


def row_bytes(k: int) -> int:
    """Return the bytes of a row of `k` values: their codes, and an e4m3 scale for each 16 of them."""
    return k // 2 + k // BLOCK


def to_rows(tensor: Nvfp4) -> np.ndarray:
    """Return the bytes of rows, [..., 9 K / 16] int8: of each its codes, packed, and behind them its block scales."""
    return np.concatenate([pack(tensor.codes), tensor.block_scales.view(np.uint8)], -1).view(np.int8)


def from_rows(rows: np.ndarray) -> np.ndarray:
    """Return codes times block scales of `to_rows`, [..., K] f32, exact; the tensor's scale is left out.

    Args:
        rows: [..., 9 K / 16] int8, K a multiple of 16.
    """
    k = rows.shape[-1] * BLOCK // row_bytes(BLOCK)
    raw = np.ascontiguousarray(rows).view(np.uint8)
    scales = raw[..., k // 2 :].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return dequantize_steps(unpack(raw[..., : k // 2]), scales)


def rows_of_fp8(weight: np.ndarray) -> np.ndarray:
    """Return the bytes of rows (`to_rows`) of FP8 values, of the smallest squared error of a few scales.

    The second-level scale is that of the 128×128 block over 6 (`second_scales`), so that the scale of 16 values can be
    their largest magnitude: an e4m3 value, which then comes back as it was. Scales beside it are tried too (`_STEPS`).

    Args:
        weight: [..., K] e4m3 without NaN, K a multiple of 16.

    Returns:
        [..., 9 K / 16] int8.
    """
    k = weight.shape[-1]
    raw = weight.view(np.uint8).reshape(-1, k)
    out = np.empty((len(raw), row_bytes(k)), np.uint8)
    step = max(1, _VALUES // k)
    for start in range(0, len(raw), step):
        rows = raw[start : start + step]
        codes, scales = _of_fp8_blocks(rows.reshape(-1, BLOCK))
        out[start : start + step, : k // 2] = pack(codes.reshape(rows.shape))
        out[start : start + step, k // 2 :] = scales.reshape(len(rows), -1)
    return out.view(np.int8).reshape(*weight.shape[:-1], -1)


def second_scales(scale: np.ndarray) -> np.ndarray:
    """Return what multiplies the rows of `rows_of_fp8` besides, f32: the scales of the 128×128 blocks over 6."""
    return scale / np.float32(E2M1_MAX)


def _of_fp8_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return e2m1 codes [B, 16] and e4m3 scales [B], as bytes, of e4m3 bytes [B, 16]."""
    codes, errors = _of_fp8()
    magnitudes = (blocks & 0x7F).astype(np.int32)
    largest = magnitudes.max(-1)
    best = largest << 7
    least = errors[best[:, None] | magnitudes].sum(-1)
    for step in _STEPS:
        tried = np.clip(largest + step, 0, 126) << 7
        error = errors[tried[:, None] | magnitudes].sum(-1)
        np.copyto(best, tried, where=error < least)
        np.minimum(least, error, out=least)
    return codes[best[:, None] | magnitudes] | ((blocks & 0x80) >> 4), (best >> 7).astype(np.uint8)


@functools.cache
def _of_fp8() -> tuple[np.ndarray, np.ndarray]:
    """Return e2m1 codes u8 and squared errors f32 of each e4m3 magnitude under each e4m3 scale over 6, [128 · 128]."""
    values = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values[127] = 0  # NaN, which no weight is
    steps = values[:, None] / np.float32(E2M1_MAX)
    codes = e2m1(np.divide(values, steps, out=np.zeros((128, 128), np.float32), where=steps > 0))
    return codes.reshape(-1), np.square(_MAGNITUDES[codes] * steps - values).reshape(-1)


def dequantize(tensor: Nvfp4) -> np.ndarray:
    """Return the values, [..., K] f32."""
    return dequantize_steps(tensor.codes, tensor.block_scales.astype(np.float32) * tensor.tensor_scale)


def dequantize_steps(codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the values [..., K] f32 of codes [..., K] whose blocks of 16 have the scales `steps` [..., K / 16] f32."""
    values = _MAGNITUDES[codes % _SIGN]
    values = np.where(codes >= _SIGN, -values, values)
    return (values.reshape(*values.shape[:-1], -1, BLOCK) * steps[..., None]).reshape(values.shape)


def round_trip(x: np.ndarray, tensor_scale: float | None = None) -> np.ndarray:
    """Return what is left of `x` [..., K] f32 when it is stored in NVFP4; arguments as of `quantize`."""
    return dequantize(quantize(x, tensor_scale))
