"""Read and write a checkpoint folder of safetensors shards: headers checked whole, weights memory-mapped.

Our own reader, because the public NumPy one refuses F8_E4M3 and because every command starts here: what a
damaged download looks like must be said in one line before any work is done. Opening reads the index and the
headers only, so a 690 GB checkpoint opens in seconds; a tensor is a view of the mapped file, never a copy.

Source: safetensors format description, github.com/huggingface/safetensors README.md, "Format".
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, TypeGuard

import numpy as np

from seekforge.common.dtypes import NUMPY, SAFETENSORS, itemsize
from seekforge.common.errors import CheckpointError
from seekforge.common.paths import name_fault
from seekforge.common.reading import LISTING_BYTES, check_regular, parse_json, read_bytes

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"

#: The format's own limit; a longer one is a damaged file, not a large model.
_MAX_HEADER_BYTES: Final = 100_000_000
_LENGTH_BYTES: Final = 8
_ALIGNMENT: Final = 8
#: Word in a header -> our name, of the types that a checkpoint may hold.
_HELD: Final = {SAFETENSORS[name]: name for name in ("f32", "bf16", "f8e4m3", "f16", "f8e8m0")}
_FROM_NUMPY: Final = {NUMPY[name]: name for name in _HELD.values()}
_LFS_POINTER: Final = b"version https://git-lfs"
_AGAIN: Final = "download it again"
_NUMBERED: Final = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


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
class _Shard:
    path: Path
    file_bytes: int
    header: bytes
    tensors: dict[str, TensorInfo]


class Checkpoint:
    """The tensors of a checkpoint folder, by name. A context manager; `tensor` maps shards when first asked."""

    def __init__(self, folder: Path, index: bytes, shards: Mapping[str, _Shard]) -> None:
        """Use `Checkpoint.open`."""
        self.folder = folder
        self._index = index
        self._shards = dict(shards)
        self._tensors = {name: info for shard in shards.values() for name, info in shard.tensors.items()}
        self._maps: dict[str, mmap.mmap] = {}

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read the index and all headers of `folder`; no weight bytes.

        Args:
            folder: holds `model.safetensors.index.json` and its shards, or without an index one safetensors file or
                a whole series such as `model-00001-of-00003.safetensors`.

        Raises:
            CheckpointError: the folder, the index or a shard is missing, damaged or contradicts another.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: {'is a file' if folder.exists() else 'does not exist'}, expected a checkpoint folder "
                f"with {INDEX_FILE} and its shards"
            )
        index_path = folder / INDEX_FILE
        if index_path.exists():
            raw = _read_bytes(index_path)
            weight_map = parse_index(raw, index_path)
            files = sorted(set(weight_map.values()))
            _require_shards(folder, files)
            shards = {file: _read_shard(folder / file) for file in files}
            _match_index(weight_map, shards, index_path)
            return Checkpoint(folder, raw, shards)
        present = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
        shards = {file: _read_shard(folder / file) for file in shards_without_index(present, folder)}
        _locate(shards)
        return Checkpoint(folder, b"", shards)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in the order of shards and of data in them."""
        return tuple(self._tensors)

    @property
    def shards(self) -> dict[str, int]:
        """Size in bytes of each shard file, by name."""
        return {name: shard.file_bytes for name, shard in self._shards.items()}

    def __contains__(self, name: object) -> bool:
        """Whether the checkpoint has a tensor called `name`."""
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder}: has no tensor {name!r} among its {len(self._tensors)}; "
                "the checkpoint does not belong to this config"
            ) from None

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of its mapped shard; no copy, any byte offset.

        Returns:
            Array of the tensor's shape; F8_E4M3 as ml_dtypes.float8_e4m3fn, BF16 as ml_dtypes.bfloat16.

        Raises:
            CheckpointError: there is no such tensor, or the shard changed since it was opened.
        """
        info = self.info(name)
        dtype = NUMPY[info.dtype]
        if info.num_bytes == 0:
            return np.empty(info.shape, dtype)
        return np.ndarray(info.shape, dtype, buffer=self._map(info.shard), offset=info.begin)

    def index_digest(self) -> str:
        """Return a SHA-256, in hex, over the index and every shard's name, size and header.

        Two checkpoints with the same digest have the same tensors in the same places; values may differ.
        """
        digest = hashlib.sha256(self._index)
        for name in sorted(self._shards):
            shard = self._shards[name]
            digest.update(f"\0{name}\0{shard.file_bytes}\0".encode())
            digest.update(shard.header)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the shards. Arrays given out stay valid: a mapping lives until its last view is gone.

        mmap.close() is not called: NumPy keeps a reference to the mapping but no export of its buffer, so it
        would unmap memory under live arrays.
        """
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        """Return the checkpoint itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the checkpoint."""
        self.close()

    def _map(self, name: str) -> mmap.mmap:
        mapping = self._maps.get(name)
        if mapping is None:
            shard = self._shards[name]
            try:
                with shard.path.open("rb") as file:
                    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{shard.path}: cannot be mapped ({error}); is it still there?") from None
            if len(mapping) != shard.file_bytes:
                raise CheckpointError(
                    f"{shard.path}: is now {len(mapping)} bytes, was {shard.file_bytes} when opened; "
                    "do not write to a checkpoint in use, start again"
                )
            self._maps[name] = mapping
        return mapping


# --- index --------------------------------------------------------------------------------------------------


def read_index(path: Path) -> dict[str, str]:
    """Return weight_map (tensor name -> shard file name) of an index file.

    Raises:
        CheckpointError: it cannot be read, is no regular file, too large, or malformed.
    """
    return parse_index(_read_bytes(path), path)


def parse_index(raw: bytes, path: Path) -> dict[str, str]:
    """Return weight_map (tensor name -> shard file name) of an index."""
    index = _parse_json(raw, str(path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no 'weight_map' of tensor names to shard files; {_AGAIN}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_file_name(file):
            raise CheckpointError(
                f"{path}: puts {tensor!r} in {file!r}, expected the plain name of a file in the same folder; {_AGAIN}"
            )
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    return name_fault(name) is None and "/" not in name


def _require_shards(folder: Path, files: list[str]) -> None:
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(files)} shards)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder / missing[0]}: is missing{more}, but {INDEX_FILE} names it; finish the download"
        )


def shards_without_index(present: Iterable[str], folder: Path) -> list[str]:
    """Choose the shards of a folder that has no index.

    Args:
        present: names of the safetensors files in it.
        folder: what to call it in an error.

    Returns:
        `model.safetensors` where it is, else the only file, else the whole of one numbered series, in its order.

    Raises:
        CheckpointError: there are none, some of a series are missing, or it cannot be said which files belong together.
    """
    files = sorted(present)
    if SINGLE_FILE in files:
        return [SINGLE_FILE]
    series: dict[tuple[str, int], dict[int, str]] = {}
    for file in files:
        match = _NUMBERED.fullmatch(file)
        if match is not None:
            series.setdefault((match[1], int(match[3])), {})[int(match[2])] = file
    if len(files) == 1 and not series:
        return files
    if not files:
        raise CheckpointError(
            f"{folder}: holds neither {INDEX_FILE} nor a safetensors file; pass a Hugging Face checkpoint folder, "
            "or finish its download"
        )
    if len(series) != 1 or len(files) != sum(map(len, series.values())):
        raise CheckpointError(
            f"{folder}: has no {INDEX_FILE}, and of its {len(files)} safetensors files ({files[0]}, {files[-1]}) it "
            "cannot be said which belong together; download the index too"
        )
    ((stem, count), numbered) = next(iter(series.items()))
    first = 0 if 0 in numbered else 1
    missing = next(
        (number for number in range(first, first + min(count, len(numbered) + 1)) if number not in numbered), None
    )
    if missing is not None or len(numbered) != count:
        raise CheckpointError(
            f"{folder}: has {len(numbered)} of the {count} shards {stem}-*-of-{count} and no {INDEX_FILE}"
            f"{'' if missing is None else f'; number {missing} is missing'}; finish the download"
        )
    return [numbered[number] for number in sorted(numbered)]


def _locate(shards: Mapping[str, _Shard]) -> dict[str, str]:
    """Return tensor -> shard; each tensor may be in one shard only."""
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for tensor in shard.tensors:
            if tensor in seen:
                raise CheckpointError(
                    f"{shard.path}: holds {tensor!r}, which {seen[tensor]} holds too; "
                    "expected each tensor once, remove the stale shard or download the folder again"
                )
            seen[tensor] = file
    return seen


def _match_index(weight_map: Mapping[str, str], shards: Mapping[str, _Shard], path: Path) -> None:
    """Check that index and headers put the same tensors in the same shards, each once."""
    seen = _locate(shards)
    for tensor, file in weight_map.items():
        shard_of = seen.get(tensor)
        if shard_of != file:
            where = f"{shard_of} holds it" if shard_of else "no shard holds it"
            raise CheckpointError(
                f"{path}: puts {tensor!r} in {file}, but {where}; index and shards are of different downloads, "
                "download the folder again"
            )
    extra = seen.keys() - weight_map.keys()
    if extra:
        tensor = min(extra)
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{path}: does not list {tensor!r}{more}, which {seen[tensor]} holds; "
            "index and shards are of different downloads, download the folder again"
        )


# --- one shard ----------------------------------------------------------------------------------------------


def _read_shard(path: Path) -> _Shard:
    """Read and check the header of one shard."""
    try:
        file_bytes = check_regular(path).st_size
        with path.open("rb") as file:
            header = _read_header(file, file_bytes, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check it and its permissions") from None
    return _Shard(path, file_bytes, header, parse_header(header, file_bytes=file_bytes, path=path))


def _read_header(file: BinaryIO, file_bytes: int, path: Path) -> bytes:
    start = file.read(len(_LFS_POINTER))
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run 'git lfs pull' in that folder")
    if len(start) < _LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: is {file_bytes} bytes, expected a safetensors file (8 bytes of header length first); {_AGAIN}"
        )
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    room = min(file_bytes - _LENGTH_BYTES, _MAX_HEADER_BYTES)
    if length > room:
        raise CheckpointError(
            f"{path}: says its header is {length} bytes, expected at most {room} in this file of {file_bytes} bytes; "
            f"it is truncated or no safetensors file, {_AGAIN}"
        )
    file.seek(_LENGTH_BYTES)
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
    raw = _parse_json(header, f"{path}: header")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: header is a JSON {type(raw).__name__}, expected an object; {_AGAIN}")
    data_start = _LENGTH_BYTES + len(header)
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
                f"expected {position - data_start}; {_AGAIN}"
            )
        position = info.end
    if position > file_bytes:
        raise CheckpointError(
            f"{path}: is truncated: {file_bytes} bytes, its header describes {position}; finish the download"
        )
    if position < file_bytes:
        raise CheckpointError(f"{path}: is {file_bytes} bytes, its header describes only {position}; {_AGAIN}")
    return dict(tensors)


def _parse_entry(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _is_list_of_sizes(shape) or not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: the header's entry of {name!r} is malformed, expected dtype, shape and two data_offsets; {_AGAIN}"
        )
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _HELD:
        raise CheckpointError(
            f"{path}: {name!r} has dtype {dtype!r}, expected one of {', '.join(_HELD)}; "
            "pass a checkpoint in DeepSeek's FP8 format, such as deepseek-ai/DeepSeek-V3.2"
        )
    begin, end = offsets
    ours = _HELD[dtype]
    expected = math.prod(shape) * itemsize(ours)
    if end - begin != expected or math.prod(size or 1 for size in shape) >= 2**60 or len(shape) > 8:
        raise CheckpointError(
            f"{path}: {name!r} of shape {shape} and dtype {dtype} has byte range {begin} to {end}, "
            f"expected {expected} bytes; {_AGAIN}"
        )
    return TensorInfo(ours, tuple(shape), path.name, data_start + begin, data_start + end)


def _is_list_of_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _parse_json(raw: bytes, origin: str) -> Any:
    try:
        return parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{origin}: not valid JSON ({error}); {_AGAIN}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, most=LISTING_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check it and its permissions") from None


# --- writing ------------------------------------------------------------------------------------------------


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
    start = _LENGTH_BYTES + len(text)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
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
