"""A checkpoint folder of safetensors shards: headers checked whole, weights memory-mapped.

Our own reader, because the public NumPy one refuses F8_E4M3 and because every command starts here: what a
damaged download looks like must be said in one line before any work is done. Opening reads the index and the
headers only, so a 690 GB checkpoint opens in seconds; a tensor is a view of the mapped file, never a copy.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import CheckpointError
from seekforge.common.reading import is_there
from seekforge.common.system import read_at
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


class Checkpoint:
    """The tensors of a checkpoint folder, by name. A context manager; `tensor` maps shards when first asked."""

    def __init__(self, folder: Path, index: bytes, shards: Mapping[str, Shard]) -> None:
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

    def read(self, name: str) -> np.ndarray:
        """Return a copy of a tensor, as `tensor` has it, by reading: a shard that shrinks meanwhile is no SIGBUS.

        Raises:
            CheckpointError: there is no such tensor, or its shard cannot be read or is shorter than when opened.
        """
        info = self.info(name)
        path = self.folder / info.shard
        out = np.empty(info.shape, NUMPY[info.dtype])
        left, place = out.reshape(-1).view(np.uint8).data, info.begin
        try:
            with path.open("rb") as file:
                while left:
                    count = read_at(file.fileno(), left, place)
                    if count == 0:
                        raise OSError(errno.EIO, f"ends before {name}")
                    left, place = left[count:], place + count
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}); do not write to a checkpoint in use, start again"
            ) from None
        return out

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
