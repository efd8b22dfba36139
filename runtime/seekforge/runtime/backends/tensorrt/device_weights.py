"""Weights and tables of an engine in device memory: each one once, streamed from the checkpoint through two buffers.

While one buffer is copied to the device, the other is filled by the loader's threads; tensors larger than a buffer
go in slices. So the host holds two buffers, whatever the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from seekforge.common.cores import usable_cores
from seekforge.common.dtypes import NUMPY, itemsize
from seekforge.common.errors import EngineError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.loader import Loader, LoadProgress
from seekforge.formats.weight_digests import WeightDigests
from seekforge.formats.weight_recipes import Recipe, TensorSource, evaluate_into, slice_
from seekforge.runtime.backends.base import OnLoad
from seekforge.runtime.backends.tensorrt.device import Device

#: Bytes of one buffer.
STAGING_BYTES: Final = 1 << 30
_ALIGNMENT: Final = 256
_MOST_READERS: Final = 8


@dataclass(frozen=True)
class Piece:
    """A part of a weight: rows of its first axis, or all of it.

    Attributes:
        recipe: makes it from the checkpoint.
        address: the device address that it goes to.
    """

    recipe: Recipe
    address: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return num_bytes(self.recipe)


@dataclass
class Batch:
    """Pieces that lie in one buffer together, with their offsets."""

    pieces: list[Piece] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    size: int = 0

    def take(self, piece: Piece) -> None:
        """Add a piece."""
        self.pieces.append(piece)
        self.offsets.append(self.size)
        self.size += -(-piece.num_bytes // _ALIGNMENT) * _ALIGNMENT


def num_bytes(recipe: Recipe) -> int:
    """Return the bytes of what a recipe makes."""
    return math.prod(recipe.shape) * itemsize(recipe.dtype)


def batches(pieces: Iterable[Piece], most: int) -> Iterator[Batch]:
    """Deal pieces, in order, into batches of at most `most` bytes; larger ones are cut along their first axis."""
    batch = Batch()
    for piece in pieces:
        for part in _cut(piece, most):
            if batch.pieces and batch.size + part.num_bytes > most:
                yield batch
                batch = Batch()
            batch.take(part)
    if batch.pieces:
        yield batch


def _cut(piece: Piece, most: int) -> Iterator[Piece]:
    if piece.num_bytes <= most or piece.recipe.shape[0] == 1:
        yield piece
        return
    rows = piece.recipe.shape[0]
    per_row = piece.num_bytes // rows
    step = max(most // per_row, 1)
    for start in range(0, rows, step):
        part = slice_(piece.recipe, 0, start, min(start + step, rows))
        yield Piece(part, piece.address + start * per_row)


class DeviceWeights:
    """The constants of an engine's graphs.

    Args:
        folder: the engine, for messages.
        bindings: graph -> constant -> recipe.
        device: the device that they go to.
        checkpoint: opens the checkpoint when it is first needed.
        progress: called while a graph is loaded.
        staging_bytes: size of each of the two buffers.
        digests: what the checkpoint's tensors must be; None: any of their structure.
    """

    def __init__(
        self,
        folder: Path,
        bindings: Mapping[str, Mapping[str, Recipe]],
        device: Device,
        checkpoint: Callable[[], Checkpoint],
        *,
        progress: OnLoad | None = None,
        staging_bytes: int = STAGING_BYTES,
        digests: WeightDigests | None = None,
    ) -> None:
        self._folder, self._bindings, self._device, self._checkpoint = folder, bindings, device, checkpoint
        self._progress, self._staging_bytes, self._digests = progress, staging_bytes, digests
        self._addresses: dict[str, int] = {}  # recipe -> address: graphs share embedding and head
        self._staging: list[np.ndarray] = []

    def load(self, graph: str, names: Iterable[str]) -> dict[str, int]:
        """Return where the constants of a graph lie; what is not on the device yet is read from the checkpoint.

        Raises:
            EngineError: the bindings say nothing of a constant.
            CheckpointError: a shard cannot be read or holds values that no checkpoint may hold.
            MemoryError: there is not enough device memory.
        """
        recipes = {name: self._recipe(graph, name) for name in names}
        new = []
        for recipe in recipes.values():
            key = _key(recipe)
            if key not in self._addresses:
                self._addresses[key] = self._device.allocate(max(num_bytes(recipe), 1))
                new.append(Piece(recipe, self._addresses[key]))
        if new:
            self._fill(new)
        return {name: self._addresses[_key(recipe)] for name, recipe in recipes.items()}

    def update(self, changed: Mapping[str, Mapping[str, Recipe]], tensors: TensorSource) -> None:
        """Write constants anew from `tensors`; addresses stay."""
        written: set[str] = set()
        for recipes in changed.values():
            for recipe in recipes.values():
                key = _key(recipe)
                if key in self._addresses and key not in written:
                    value = np.empty(recipe.shape, NUMPY[recipe.dtype])
                    evaluate_into(recipe, tensors, value)
                    self._device.upload(self._addresses[key], value)
                    written.add(key)

    def close(self) -> None:
        """Give all back."""
        for address in self._addresses.values():
            self._device.free(address)
        self._addresses.clear()

    def _recipe(self, graph: str, name: str) -> Recipe:
        try:
            return self._bindings[graph][name]
        except KeyError:
            raise EngineError(
                f"{self._folder / 'bindings.json'}: says nothing of {name} of graph {graph}; build the engine again"
            ) from None

    def _fill(self, pieces: list[Piece]) -> None:
        source = self._checkpoint()
        total, done, seconds = sum(piece.num_bytes for piece in pieces), 0, 0.0
        readers = min(usable_cores(), _MOST_READERS)
        dealt = list(batches(pieces, self._staging_bytes))
        largest = max(batch.size for batch in dealt)
        for number, batch in enumerate(dealt):
            buffer = self._buffer(number % 2, largest)
            names = [str(i) for i in range(len(batch.pieces))]
            recipes = {name: piece.recipe for name, piece in zip(names, batch.pieces, strict=True)}
            views = {
                name: _view(buffer, offset, piece.recipe)
                for name, piece, offset in zip(names, batch.pieces, batch.offsets, strict=True)
            }
            size = sum(piece.num_bytes for piece in batch.pieces)
            report = Loader(source, recipes, views, threads=readers, scan=True, digests=self._digests).run(
                self._scaled(done, size, total, seconds)
            )
            self._device.synchronize()  # the copies of the batch before are done: its buffer is free for the next one
            for name, piece in zip(names, batch.pieces, strict=True):
                self._device.upload_staged(piece.address, views[name])
            done, seconds = done + size, seconds + report.seconds
        self._device.synchronize()

    def _buffer(self, number: int, size: int) -> np.ndarray:
        """Return one of the two buffers, of at least `size` bytes; the one it had before lives until the end."""
        if len(self._staging) <= number:
            self._staging.append(self._device.staging(size))
        elif len(self._staging[number]) < size:
            self._staging[number] = self._device.staging(size)
        return self._staging[number]

    def _scaled(self, done: int, size: int, total: int, seconds: float) -> OnLoad | None:
        """Return what turns the progress of one batch into that of all, in bytes of the device."""
        tell = self._progress
        if tell is None:
            return None

        def step(batch: LoadProgress) -> None:
            share = batch.done_bytes / batch.total_bytes if batch.total_bytes else 1.0
            tell(LoadProgress(done + int(share * size), total, seconds + batch.seconds))

        return step


def _view(buffer: np.ndarray, offset: int, recipe: Recipe) -> np.ndarray:
    return buffer[offset : offset + num_bytes(recipe)].view(NUMPY[recipe.dtype]).reshape(recipe.shape)


def _key(recipe: Recipe) -> str:
    return json.dumps(recipe.to_dict())
