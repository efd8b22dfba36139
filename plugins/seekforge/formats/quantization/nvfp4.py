"""NVFP4: e2m1 values in blocks of 16 with an e4m3 scale each, and one f32 scale for the whole tensor. NumPy only.

real = value · block_scale · tensor_scale. The tensor's scale puts the largest block scale at 448, the largest e4m3;
a block's scale puts its largest magnitude at 6, the largest e2m1, and is rounded to e4m3 before values are divided.
No engine here computes in it: checkpoints hold such weights, which are read exactly, and it is a reference form, which
says what such weights or caches would cost.

Source: NVIDIA's description of NVFP4 (two-level scales, blocks of 16); TensorRT Model Optimizer, `NVFP4QTensor`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import ml_dtypes
import numpy as np

#: Values that share a scale.
BLOCK: Final = 16
#: Largest e2m1 and e4m3 values.
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0
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
