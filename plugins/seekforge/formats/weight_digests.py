"""Digests of the weights that a GPU engine reads from a checkpoint: weight_digests.json of the engine.

Made when the engine is built with a checkpoint, and compared while weights stream to the GPU: what was just read into a
buffer is hashed there. Only where a read ends inside a chunk is the rest of that chunk read too, once per load.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from seekforge.common.cores import usable_cores
from seekforge.common.errors import CheckpointError, EngineError
from seekforge.common.files import write_json
from seekforge.common.reading import LISTING_BYTES, read_json
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_header import TensorInfo

FILE: Final = "weight_digests.json"
_FORMAT: Final = 1
#: 690 GB have a quarter of a million of these.
CHUNK_BYTES: Final = 4 << 20
_MOST_THREADS: Final = 16


class WeightDigests:
    """What weights must be. Safe to use from several threads."""

    def __init__(self, tensors: Mapping[str, tuple[str, ...]]) -> None:
        self._tensors = tensors
        self._compared: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def compare(
        self, name: str, num_bytes: int, begin: int, data: np.ndarray, read: Callable[[int, np.ndarray], None]
    ) -> tuple[int, int] | None:
        """Compare what was read of a tensor.

        Args:
            name: the name of the tensor; one without digests is not compared.
            num_bytes: bytes of the whole tensor.
            begin: the byte of the tensor at which `data` begins.
            data: bytes.
            read: fills an array from a byte of the tensor on; used for the rest of a chunk.

        Returns:
            The byte range of a chunk that is not what it was at build; None: there is none.
        """
        expected = self._tensors.get(name)
        if expected is None or not data.size:
            return None
        if len(expected) != -(-num_bytes // CHUNK_BYTES):
            return 0, num_bytes
        end = begin + data.size
        for number in range(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            low, high = number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, num_bytes)
            if begin <= low and high <= end:
                chunk = data[low - begin : high - begin]
            else:
                with self._lock:
                    if (name, number) in self._compared:
                        continue
                    self._compared.add((name, number))
                chunk = np.empty(high - low, np.uint8)
                read(low, chunk)
            if xxhash.xxh3_64_hexdigest(chunk.data) != expected[number]:
                with self._lock:
                    self._compared.discard((name, number))  # it may be mended, and read again
                return low, high
        return None


def load_weight_digests(folder: Path) -> WeightDigests:
    """Read weight_digests.json of an engine.

    Raises:
        EngineError: it cannot be read or is malformed.
    """
    path = folder / FILE
    try:
        raw = read_json(path, most=LISTING_BYTES)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); build the engine again") from None
    tensors = raw.get("tensors") if isinstance(raw, dict) and raw.get("format") == _FORMAT else None
    if not isinstance(tensors, dict) or not all(isinstance(value, str) for value in tensors.values()):
        raise EngineError(f"{path}: is not of format {_FORMAT} or malformed; build the engine again")
    return WeightDigests({name: tuple(words.split()) for name, words in tensors.items()})


def write_weight_digests(
    folder: Path, checkpoint: Checkpoint, names: Collection[str], progress: Callable[[int, int], None]
) -> None:
    """Digest tensors of a checkpoint into weight_digests.json of `folder`; holes in a file are not read.

    Args:
        folder: the folder of the engine.
        checkpoint: the checkpoint that holds the weights.
        names: tensors.
        progress: called with the bytes that are done, and all.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    infos = {name: checkpoint.info(name) for name in sorted(names)}
    total, done, lock = sum(info.num_bytes for info in infos.values()), 0, threading.Lock()

    def one(name: str) -> str:
        nonlocal done
        words = _digests_of(checkpoint.folder / infos[name].shard, infos[name])
        with lock:
            done += infos[name].num_bytes
            progress(done, total)
        return " ".join(words)

    with ThreadPoolExecutor(min(usable_cores(), _MOST_THREADS), "digests") as pool:
        tensors = dict(zip(infos, pool.map(one, infos), strict=True))
    write_json(folder / FILE, {"format": _FORMAT, "tensors": tensors})


def _digests_of(path: Path, info: TensorInfo) -> list[str]:
    digests = []
    try:
        with io.FileIO(path) as file:
            buffer = memoryview(bytearray(min(CHUNK_BYTES, info.num_bytes)))
            for low in range(info.begin, info.end, CHUNK_BYTES):
                size = min(CHUNK_BYTES, info.end - low)
                if _is_hole(file, low, low + size):
                    digests.append(_of_zeros(size))
                    continue
                file.seek(low)
                filled = 0
                while filled < size:
                    count = file.readinto(buffer[filled:size])
                    if not count:
                        raise CheckpointError(f"{path}: shrank while it was read; do not write to a checkpoint in use")
                    filled += count
                digests.append(xxhash.xxh3_64_hexdigest(buffer[:size]))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the disk") from None
    return digests


def _is_hole(file: io.FileIO, low: int, high: int) -> bool:
    """Return whether nothing was ever written there, where the system tells."""
    try:
        return os.lseek(file.fileno(), low, os.SEEK_DATA) >= high
    except (OSError, AttributeError):  # ENXIO: no data to the end of the file; others read
        try:
            return os.lseek(file.fileno(), low, os.SEEK_HOLE) == low
        except (OSError, AttributeError):
            return False


@cache
def _of_zeros(size: int) -> str:
    return xxhash.xxh3_64_hexdigest(bytes(size))
