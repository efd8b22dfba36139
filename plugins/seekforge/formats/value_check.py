"""Value checks of spec §2.6 on bytes that were just read: at memory speed, with a scratch of half a megabyte.

A bad value is a bit pattern: all exponent bits set (and all mantissa bits, in e4m3, which has no infinity). Adding
one at the lowest exponent bit then carries into the sign bit, in all lanes of a 64-bit word at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from seekforge.common.errors import CheckpointError

#: What the name of a weight's block scales has behind that of the weight.
SCALE_SUFFIX: Final = "_scale_inv"
#: Ends of the names that ModelOpt and LLM Compressor give to scales of matrices, rows and blocks.
_OTHER_SCALES: Final = (".weight_scale", ".weight_scale_2", ".weight_global_scale")
_NUMBERED = re.compile(r"^model\.layers\.\d+\.|(?<=experts)\.\d+(?=\.)")

#: dtype -> lane type, bits that are all set in a bad value, and what added to them carries into the sign bit.
_LANES: Final[dict[str, tuple[type[np.unsignedinteger], int, int]]] = {
    "f8e4m3": (np.uint8, 0x7F, 0x01),
    "bf16": (np.uint16, 0x7F80, 0x0080),
    "f16": (np.uint16, 0x7C00, 0x0400),
    "f32": (np.uint32, 0x7F80_0000, 0x0080_0000),
}
#: NaN in e8m0, which has eight bits of exponent and nothing else: no lane has a sign bit to carry into.
_E8M0_NAN: Final = 0xFF


def _words(lane: type[np.unsignedinteger], value: int) -> np.uint64:
    """Repeat a lane's value over 64 bits."""
    bits = np.dtype(lane).itemsize * 8
    return np.uint64(sum(value << shift for shift in range(0, 64, bits)))


@dataclass(frozen=True)
class Family:
    """The block scales of one kind of weight, over all layers and experts that were read.

    Attributes:
        num_tensors: scale tensors seen.
        num_powers_of_two: how many of them hold powers of two only.
        smallest, largest: extreme values.
    """

    num_tensors: int
    num_powers_of_two: int
    smallest: float
    largest: float


class Findings:
    """What scans saw of the scales. Safe to use from several threads: a tensor's entry is replaced whole."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[bool, float, float]] = {}

    def add(self, tensor: str, scales: np.ndarray) -> None:
        """Take note of (a part of) a scale tensor."""
        if not scales.size:
            return
        seen = (bool(np.all(np.frexp(scales)[0] == 0.5)), float(scales.min()), float(scales.max()))
        before = self._tensors.get(tensor, (True, seen[1], seen[2]))
        self._tensors[tensor] = (before[0] and seen[0], min(before[1], seen[1]), max(before[2], seen[2]))

    def families(self) -> dict[str, Family]:
        """Return kind of weight, which is its name without numbers -> its scales."""
        result: dict[str, Family] = {}
        for tensor, (power, low, high) in sorted(self._tensors.items()):
            name = _NUMBERED.sub("", tensor).removesuffix(".weight" + SCALE_SUFFIX)
            old = result.get(name, Family(0, 0, low, high))
            result[name] = Family(
                old.num_tensors + 1, old.num_powers_of_two + power, min(old.smallest, low), max(old.largest, high)
            )
        return result


def first_fault(values: np.ndarray, dtype: str, scratch: np.ndarray) -> int | None:
    """Return the place of the first NaN or infinity, or None.

    Args:
        values: contiguous bytes, a whole number of elements.
        dtype: f8e4m3, f8e8m0, bf16, f16 or f32; u8, packed codes, of which each is a value.
        scratch: uint64 words; so much is checked at once.
    """
    if dtype == "u8":
        return None
    if dtype == "f8e8m0":  # block scales alone, one for 16,384 weights: there are few
        places = np.flatnonzero(values == _E8M0_NAN)
        return int(places[0]) if places.size else None
    lane, mask, one = _LANES[dtype]
    masks, ones, sign = _words(lane, mask), _words(lane, one), _words(lane, (mask + one) & ~mask)
    # whole words at any address: NumPy reads unaligned ones as well
    whole = values[: values.size // 8 * 8].view(np.uint64)
    for start in range(0, whole.size, scratch.size):
        words = whole[start : start + scratch.size]
        out = scratch[: words.size]
        np.bitwise_and(words, masks, out=out)
        np.add(out, ones, out=out)
        if np.bitwise_or.reduce(out) & sign:
            bad = (words.view(lane) & lane(mask)) == lane(mask)
            return start * 8 // np.dtype(lane).itemsize + int(np.argmax(bad))
    rest = values[whole.size * 8 :].view(lane)
    bad = (rest & lane(mask)) == lane(mask)
    return whole.size * 8 // np.dtype(lane).itemsize + int(np.argmax(bad)) if bad.any() else None


def is_positive(tensor: str, dtype: str) -> bool:
    """Whether a tensor has scales that are all above 0. Those of NVFP4's blocks, in FP8, are 0 where a block is."""
    return tensor.endswith(SCALE_SUFFIX) or (dtype != "f8e4m3" and tensor.endswith(_OTHER_SCALES))


def first_not_positive(scales: np.ndarray) -> int | None:
    """Return the place of the first scale that is not above 0, or None."""
    flat = scales.reshape(-1)
    if not flat.size or flat.min() > 0:
        return None
    return int(np.argmax(flat <= 0))


def not_finite(tensor: str, value: float, place: object) -> CheckpointError:
    """Return the error for a NaN or infinity of a tensor."""
    return CheckpointError(
        f"{tensor} holds {value} at {place}, expected finite values; the file is damaged, download it again"
    )


def not_positive(tensor: str, value: float, place: object) -> CheckpointError:
    """Return the error for a scale that is not above 0."""
    return CheckpointError(
        f"{tensor} holds {value} at {place}, expected every scale above 0; the file is damaged or was written without "
        "values, download it again"
    )
