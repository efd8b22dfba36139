"""Small integers for weights: codes in blocks along K with one f32 scale each, how they are made and how packed.

real = code · scale. Of a few ways to round a block, that of the smallest squared error is taken: the value of largest
magnitude falls on the lowest code, −2^(bits−1), or a little beside it, and the scale is the one that fits these codes
best. A scale may be negative. NumPy only: the runtime makes new codes when weights are updated.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from seekforge.common.cores import usable_cores

#: bits -> on which (broken) code the value of largest magnitude falls, in the ways that are tried. On weights in FP8
#: blocks these take 0.10 (8 bits) and 0.10 to 0.11 (4 bits) off the squared error of the first way alone; a grid five
#: times as fine takes 0.17 and 0.12 off.
_PLACES: Final[dict[int, tuple[float, ...]]] = {
    8: (-128.0, -127.5, -127.0, -128.5),
    4: (-8.0, -7.7, -7.4, -7.1, -8.3, -8.6, -8.9),
}
#: Values that are rounded at a time by one thread, so that what is made of them on the way stays in a core's cache; and
#: by each of several, so that they seldom wait for each other: NumPy takes Python's lock between two loops, and two
#: threads with pieces of 64K took twice as long as one, with these 0.8 times as long.
_VALUES: Final = 1 << 16
_VALUES_OF_THREADS: Final = 1 << 19


def quantize_rows(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of a matrix.

    Args:
        weight: [..., K] f32, K a multiple of `block_size`.
        bits: 8 or 4.
        block_size: values along K that share a scale.

    Returns:
        codes [..., K] int8, scales [..., K / block_size] f32. A block of zeros has scale 0.
    """
    blocks = weight.reshape(-1, block_size)
    codes, scales = np.empty(blocks.shape, np.int8), np.empty(len(blocks), np.float32)
    threads = min(usable_cores(), -(-weight.size // _VALUES_OF_THREADS))
    step = max(1, (_VALUES_OF_THREADS if threads > 1 else _VALUES) // block_size)

    def quantize(start: int) -> None:
        part = slice(start, start + step)
        codes[part], scales[part] = _quantize_blocks(blocks[part], bits)

    starts = range(0, len(blocks), step)
    if threads > 1:  # NumPy lets others run while it computes
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(quantize, starts):
                pass
    else:
        for start in starts:
            quantize(start)
    return codes.reshape(weight.shape), scales.reshape(*weight.shape[:-1], -1)


def _quantize_blocks(blocks: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes [B, block_size] int8 and scales [B] f32 of `blocks` [B, block_size] f32.

    Inside, a block is a column: whatever is done to all of them runs along memory.
    """
    values = np.ascontiguousarray(blocks.T)
    most, least = values.max(0), values.min(0)
    largest = np.where(most > -least, most, least)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest == 0, np.float32(0), np.float32(1) / largest)
    scratch = np.empty_like(values), np.empty_like(values)
    places = _PLACES[bits]
    place = np.full(len(blocks), places[0], np.float32)
    if len(places) > 1:
        smallest = np.full(len(blocks), np.inf, np.float32)
        for one in map(np.float32, places):
            error = _round(values, inverse * one, bits, scratch)[0] / (one * one)
            np.copyto(place, one, where=error < smallest)
            np.minimum(smallest, error, out=smallest)
    _, factor = _round(values, inverse * place, bits, scratch)
    return scratch[0].astype(np.int8).T, factor * largest / place


def _round(
    values: np.ndarray, inverse: np.ndarray, bits: int, scratch: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Write the codes c of t into the first of `scratch`, as f32; t is `values` [block_size, B] times `inverse` [B].

    The factor f that makes f·c most like t is t·c / c·c; with r = t − c it is 1 + r·c / c·c, and the squared error
    r·r − (r·c)² / c·c, both without the difference of large sums.

    Returns:
        Squared error and factor of each block, [B] f32, in steps of t; 0 and 1 where all is 0.
    """
    codes, rest = scratch
    lowest = -(2 ** (bits - 1))
    np.multiply(values, inverse, out=rest)
    np.rint(rest, out=codes)
    np.clip(codes, lowest, -lowest - 1, out=codes)
    np.subtract(rest, codes, out=rest)
    cc, rc, rr = (np.einsum("kb,kb->b", one, two) for one, two in ((codes, codes), (rest, codes), (rest, rest)))
    share = np.divide(rc, cc, out=np.zeros_like(rc), where=cc > 0)
    return rr - share * rc, 1 + share


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
