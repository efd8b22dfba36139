"""A checkpoint folder of safetensors shards: headers checked whole, weights read when they are asked for.

Our own reader, because the public NumPy one refuses F8_E4M3 and because every command starts here: what a
damaged download looks like must be said in one line before any work is done. Opening reads the index and the
headers only, so a 690 GB checkpoint opens in seconds. Weights are read, not mapped: a shard that shrinks meanwhile
would end the process with SIGBUS, and one that is written to would change values that were checked before.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import CheckpointError
from seekforge.common.reading import is_there
from seekforge.common.system import read_all_at
from seekforge.formats.checkpoint.shard_header import Shard, TensorInfo, read_shard
from seekforge.formats.checkpoint.shard_index import (
    INDEX_FILE,
    locate,
    match_index,
    parse_index,
    read_listing,
    require_shards,
    shards_without_index,
)

_IN_USE: Final = "do not write to a checkpoint in use, start again"


class Checkpoint:
    """The tensors of a checkpoint folder, by name. A context manager; a shard is opened when it is first read."""

    def __init__(self, folder: Path, index: bytes, shards: Mapping[str, Shard]) -> None:
        """Use `Checkpoint.open`."""
        self.folder = folder
        self._index = index
        self._shards = dict(shards)
        self._tensors = {name: info for shard in shards.values() for name, info in shard.tensors.items()}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = weakref.finalize(self, _close_all, self._files)

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
        if is_there(index_path):
            raw = read_listing(index_path)
            weight_map = parse_index(raw, index_path)
            files = sorted(set(weight_map.values()))
            require_shards(folder, files)
            shards = {file: read_shard(folder / file) for file in files}
            match_index(weight_map, shards, index_path)
            return Checkpoint(folder, raw, shards)
        present = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
        shards = {file: read_shard(folder / file) for file in shards_without_index(present, folder)}
        locate(shards)
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

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype, as it is stored.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self.info(name).dtype

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor.

        Returns:
            Array of the tensor's shape; F8_E4M3 as ml_dtypes.float8_e4m3fn, BF16 as ml_dtypes.bfloat16.

        Raises:
            CheckpointError: there is no such tensor, or its shard cannot be read or changed since it was opened.
        """
        info = self.info(name)
        out = np.empty(info.shape, NUMPY[info.dtype])
        self._fill(name, info, 0, out.reshape(-1).view(np.uint8))
        return out

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Read some of a tensor's rows, which lie along its first axis.

        Args:
            name: the tensor.
            start: the first row.
            out: C-contiguous, of the tensor's dtype and, but for the number of rows, shape; is filled.

        Raises:
            CheckpointError: as of `tensor`, or it has no such rows.
        """
        info = self.info(name)
        fits = out.ndim == len(info.shape) and out.shape[1:] == info.shape[1:] and out.dtype == NUMPY[info.dtype]
        if not fits or (out.ndim and start + len(out) > info.shape[0]):
            raise CheckpointError(
                f"{self.folder / info.shard}: {name!r} is {info.dtype} {list(info.shape)}, expected {out.dtype} "
                f"{list(out.shape)} from row {start} on; program and checkpoint are of different models"
            )
        begin = start * (info.num_bytes // max(info.shape[0], 1)) if out.ndim else 0
        self._fill(name, info, begin, out.reshape(-1).view(np.uint8))

    def pieces(self, name: str, buffer: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a tensor piece by piece, as (number of the first element, elements).

        Args:
            name: the tensor.
            buffer: uint8; every piece is read into it, so that one is gone when the next is taken.

        Raises:
            CheckpointError: as of `tensor`.
        """
        info = self.info(name)
        dtype = NUMPY[info.dtype]
        step = buffer.size // dtype.itemsize * dtype.itemsize
        for begin in range(0, info.num_bytes, step):
            piece = buffer[: min(step, info.num_bytes - begin)]
            self._fill(name, info, begin, piece)
            yield begin // dtype.itemsize, piece.view(dtype)

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
        """Close the shards."""
        _close_all(self._files)

    def __enter__(self) -> Checkpoint:
        """Return the checkpoint itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the checkpoint."""
        self.close()

    def _fill(self, name: str, info: TensorInfo, begin: int, out: np.ndarray) -> None:
        """Fill `out`, uint8, from a byte of a tensor on."""
        shard = self._shards[info.shard]
        try:
            file = self._file(shard)
            if read_all_at(file, out.data, info.begin + begin) < out.size:
                raise CheckpointError(f"{shard.path}: shrank, it ends before {name!r} does; {_IN_USE}")
            written = os.fstat(file).st_mtime_ns != shard.modified_ns
        except OSError as error:
            raise CheckpointError(
                f"{shard.path}: cannot be read ({error.strerror}); is it still there? Check the disk, then start again"
            ) from None
        if written:
            raise CheckpointError(f"{shard.path}: was written to since it was opened; {_IN_USE}")

    def _file(self, shard: Shard) -> int:
        with self._lock:
            file = self._files.get(shard.path.name)
            if file is None:
                file = self._files[shard.path.name] = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        num_bytes = os.fstat(file).st_size
        if num_bytes != shard.file_bytes:
            raise CheckpointError(
                f"{shard.path}: is now {num_bytes} bytes, was {shard.file_bytes} when opened; {_IN_USE}"
            )
        return file


def _close_all(files: dict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])
