"""Write a safetensors shard whose layout is known before its values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from seekforge.common.dtypes import NUMPY, SAFETENSORS, itemsize
from seekforge.formats.checkpoint.shard_header import HELD, LENGTH_BYTES

_ALIGNMENT: Final = 8
_FROM_NUMPY: Final = {NUMPY[name]: name for name in HELD.values()}


def build_header(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay tensors out one after the other.

    Args:
        layout: tensor name -> (our dtype name, shape), in the order of the data.

    Returns:
        The first bytes of the file (length and header, padded so that the data is 8-byte aligned) and the byte
        range in the file of each tensor.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    offsets: dict[str, tuple[int, int]] = {}
    for name, (dtype, shape) in layout.items():
        end = position + math.prod(shape) * itemsize(dtype)
        entries[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [position, end]}
        offsets[name] = (position, end)
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = LENGTH_BYTES + len(text)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return head, {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}


class ShardWriter:
    """Writes one shard whose layout is known before its values: tensors come one at a time, in any order."""

    def __init__(self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Create `path` and write its header.

        Args:
            path: the file to write.
            layout: tensor name -> (our dtype name, shape), in the order of the data.
        """
        self.path = path
        self._layout = dict(layout)
        head, self._offsets = build_header(layout)
        self._left = set(layout)
        self._file = path.open("wb")
        self._file.write(head)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor; its dtype and shape must be those of the layout."""
        dtype, shape = self._layout[name]
        assert array.shape == shape and array.dtype == NUMPY[dtype], (name, array.shape, array.dtype)
        self._file.seek(self._offsets[name][0])
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._left.discard(name)

    def __enter__(self) -> ShardWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; after a good end every tensor must have been written."""
        self._file.close()
        assert kind is not None or not self._left, f"{self.path}: not written: {sorted(self._left)[:3]}"


def write_shard(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` (float32, bfloat16 or float8_e4m3fn) as one safetensors file, one tensor at a time."""
    with ShardWriter(path, layout_of(tensors.items())) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def layout_of(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the layout (name -> dtype name, shape) of arrays."""
    return {name: (_FROM_NUMPY[array.dtype], array.shape) for name, array in tensors}
