"""Small integers for weights: codes in blocks along K with one f32 scale each, how they are made and how packed.

The value of largest magnitude of a block becomes the lowest code, −2^(bits−1), so all codes are used; a scale may be
negative. real = code · scale. NumPy only: the runtime makes new codes when weights are updated.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: Rows that are quantized at a time: bounds the scratch memory.
_ROWS = 1024


def quantize_rows(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of a matrix.

    Args:
        weight: [..., K] f32, K a multiple of `block_size`.

    Returns:
        codes [..., K] int8, scales [..., K / block_size] f32. A block of zeros has scale 0.
    """
    blocks = weight.reshape(*weight.shape[:-1], -1, block_size)
    at = np.abs(blocks).argmax(-1)[..., None]
    lowest = -(2 ** (bits - 1))
    scales = np.take_along_axis(blocks, at, -1) / np.float32(lowest)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    codes = np.clip(np.rint(blocks * inverse), lowest, -lowest - 1).astype(np.int8)
    return codes.reshape(weight.shape), scales[..., 0]


def pack(codes: np.ndarray, bits: int, block_size: int) -> np.ndarray:
    """Return codes as ONNX Runtime stores them: shifted to be positive, two to a byte where they have 4 bits.

    Args:
        codes: [..., K] int8.

    Returns:
        [..., K / block_size, block_size · bits / 8] uint8; the lower code is in the lower half of a byte.
    """
    shifted = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        shifted = shifted[..., 0::2] | (shifted[..., 1::2] << 4)
    return shifted.reshape(*codes.shape[:-1], -1, block_size * bits // 8)


def evaluate_codes(op: str, params: Mapping[str, float], part: np.ndarray) -> np.ndarray:
    """Compute a `codes`, `code_scales` or `packed` recipe from its operand, some rows at a time."""
    bits, block_size = int(params["bits"]), int(params["block_size"])
    if op == "packed":
        return pack(part, bits, block_size)
    rows = part.reshape(-1, part.shape[-1])
    index = 0 if op == "codes" else 1
    parts = [quantize_rows(rows[i : i + _ROWS], bits, block_size)[index] for i in range(0, len(rows), _ROWS)]
    return np.concatenate(parts).reshape(*part.shape[:-1], -1)
