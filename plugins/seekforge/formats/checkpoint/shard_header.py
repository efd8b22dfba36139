"""The header of one safetensors shard: which tensors it holds, and where. Checked against format and file size.

Source: safetensors format description, github.com/huggingface/safetensors README.md, "Format".
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeGuard

from seekforge.common.dtypes import SAFETENSORS, itemsize
from seekforge.common.errors import CheckpointError
from seekforge.common.reading import check_regular, parse_json

#: The format's own limit; a longer one is a damaged file, not a large model.
_MAX_HEADER_BYTES: Final = 100_000_000
LENGTH_BYTES: Final = 8
#: Word in a header -> our name, of the types that a checkpoint may hold.
HELD: Final = {SAFETENSORS[name]: name for name in ("f32", "bf16", "f8e4m3", "f16", "f8e8m0", "u8")}
_LFS_POINTER: Final = b"version https://git-lfs"
AGAIN: Final = "download it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        dtype: our name of the element type (`dtypes.NUMPY`).
        shape: sizes, outermost first.
        shard: name of the file that holds it.
        begin, end: byte range in that file.
    """

    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """A shard file whose header has been read.

    Attributes:
        path: the file.
        file_bytes: its size.
        modified_ns: when it was last written to.
        header: the JSON text of its header.
        tensors: tensor name -> place, in the order of the data.
    """

    path: Path
    file_bytes: int
    modified_ns: int
    header: bytes
    tensors: dict[str, TensorInfo]


def read_shard(path: Path) -> Shard:
    """Read and check the header of one shard.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or its header is damaged.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            header = _read_header(file, status.st_size, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check it and its permissions") from None
    tensors = parse_header(header, file_bytes=status.st_size, path=path)
    return Shard(path, status.st_size, status.st_mtime_ns, header, tensors)


def _read_header(file: BinaryIO, file_bytes: int, path: Path) -> bytes:
    start = file.read(len(_LFS_POINTER))
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run 'git lfs pull' in that folder")
    if len(start) < LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: is {file_bytes} bytes, expected a safetensors file (8 bytes of header length first); {AGAIN}"
        )
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    room = min(file_bytes - LENGTH_BYTES, _MAX_HEADER_BYTES)
    if length > room:
        raise CheckpointError(
            f"{path}: says its header is {length} bytes, expected at most {room} in this file of {file_bytes} bytes; "
            f"it is truncated or no safetensors file, {AGAIN}"
        )
    file.seek(LENGTH_BYTES)
    return file.read(length)


def parse_header(header: bytes, *, file_bytes: int, path: Path) -> dict[str, TensorInfo]:
    """Check the JSON header of a shard against the format and the file's size.

    Args:
        header: the JSON text, without the 8 length bytes before it.
        file_bytes: size of the whole file.
        path: the file, for messages and `TensorInfo.shard`.

    Returns:
        Tensor name -> place, in the order of the data.

    Raises:
        CheckpointError: not JSON, a field missing or malformed, an unknown dtype, or byte ranges that overlap,
            leave a hole, do not fit shape and dtype, or do not fill the file.
    """
    raw = parse_listing(header, f"{path}: header")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: header is a JSON {type(raw).__name__}, expected an object; {AGAIN}")
    data_start = LENGTH_BYTES + len(header)
    tensors: list[tuple[str, TensorInfo]] = []
    for name, entry in raw.items():
        if name == "__metadata__":
            continue
        tensors.append((name, _parse_entry(name, entry, data_start, path)))
    tensors.sort(key=lambda item: (item[1].begin, item[1].end))
    position = data_start
    for name, info in tensors:
        if info.begin != position:
            fault = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: {name!r} begins at byte {info.begin - data_start} of the data and {fault}, "
                f"expected {position - data_start}; {AGAIN}"
            )
        position = info.end
    if position > file_bytes:
        raise CheckpointError(
            f"{path}: is truncated: {file_bytes} bytes, its header describes {position}; finish the download"
        )
    if position < file_bytes:
        raise CheckpointError(f"{path}: is {file_bytes} bytes, its header describes only {position}; {AGAIN}")
    return dict(tensors)


def _parse_entry(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _is_list_of_sizes(shape) or not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: the header's entry of {name!r} is malformed, expected dtype, shape and two data_offsets; {AGAIN}"
        )
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in HELD:
        raise CheckpointError(
            f"{path}: {name!r} has dtype {dtype!r}, expected one of {', '.join(HELD)}; "
            "pass a checkpoint in DeepSeek's FP8 format, such as deepseek-ai/DeepSeek-V3.2"
        )
    begin, end = offsets
    ours = HELD[dtype]
    expected = math.prod(shape) * itemsize(ours)
    if end - begin != expected or math.prod(size or 1 for size in shape) >= 2**60 or len(shape) > 8:
        raise CheckpointError(
            f"{path}: {name!r} of shape {shape} and dtype {dtype} has byte range {begin} to {end}, "
            f"expected {expected} bytes; {AGAIN}"
        )
    return TensorInfo(ours, tuple(shape), path.name, data_start + begin, data_start + end)


def _is_list_of_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def parse_listing(raw: bytes, origin: str) -> Any:
    """Return the JSON value of a header or an index.

    Raises:
        CheckpointError: it is not valid JSON.
    """
    try:
        return parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{origin}: not valid JSON ({error}); {AGAIN}") from None
