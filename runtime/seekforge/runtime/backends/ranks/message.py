"""What ranks tell each other, as bytes: plain values and arrays, nothing that could be code."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seekforge.common.dtypes import NUMPY

#: The length of the JSON text that a message begins with.
_LENGTH = struct.Struct("<q")
_NAMES = {dtype: name for name, dtype in NUMPY.items()}


@dataclass(frozen=True)
class Message:
    """Values that JSON has, and arrays by name."""

    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def pack(self) -> list[memoryview]:
        """Return the bytes of the message, in pieces."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        listed = [[name, _NAMES[array.dtype], list(array.shape)] for name, array in arrays.items()]
        text = json.dumps([self.values, listed]).encode()
        head = _LENGTH.pack(len(text)) + text
        return [memoryview(head), *(array.reshape(-1).view(np.uint8).data for array in arrays.values())]

    @staticmethod
    def unpack(data: bytearray) -> Message:
        """Return the message that `pack` made these bytes of; its arrays lie in them."""
        (length,) = _LENGTH.unpack_from(data)
        values, listed = json.loads(bytes(data[_LENGTH.size : _LENGTH.size + length]))
        place, arrays = _LENGTH.size + length, {}
        for name, dtype, shape in listed:
            size = NUMPY[dtype].itemsize * int(np.prod(shape, dtype=np.int64))
            piece = np.frombuffer(data, np.uint8, size, place)
            arrays[name] = piece.copy().view(NUMPY[dtype]).reshape(shape)  # the copy is aligned
            place += size
        return Message(values, arrays)
