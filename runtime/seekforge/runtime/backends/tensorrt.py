"""Runs engines of GPU targets with TensorRT or TensorRT-RTX.

Everything lives in device memory: caches, updated in place since a plan's cache output has the address of its input;
weights, streamed from the checkpoint by the engine's bindings, a tensor at a time; inputs and outputs. Steps of few
tokens a row are padded to buckets of (B, Q, table width, logits rows), and each bucket is captured once as a CUDA
graph: at that size the host's launches would cost more than the kernels.

What touches the device is behind `Device` and `Plan` (`cuda.py` has the real ones): all else is tested without one.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from seekforge.plugins.errors import EngineError
from seekforge.plugins.formats.bindings import Recipe, TensorSource, evaluate_into
from seekforge.plugins.formats.dtypes import NUMPY, itemsize
from seekforge.plugins.formats.manifest import Manifest
from seekforge.plugins.formats.program import GraphIO, TensorSpec, load_bindings
from seekforge.plugins.formats.safetensors import Checkpoint
from seekforge.runtime.backends.base import MODEL, ROW_RESULTS, StepInputs
from seekforge.runtime.kv_cache import blocks_needed
from seekforge.runtime.weights import GivenTensors, changed_constants

#: Rows with at most so many tokens are padded to buckets and captured: decode, and verification of drafts.
_CAPTURED_WIDTH = 8
#: Captured graphs kept; each holds some device memory.
_MAX_CAPTURED = 128
_BINDINGS = "bindings.json"

#: Of one captured graph: graph name, B, Q, table width, logits rows.
Bucket = tuple[str, int, int, int, int]


class Plan(Protocol):
    """One deserialised engine with its execution context."""

    def names(self) -> list[str]:
        """Names of all inputs and outputs."""
        ...

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input for the next enqueue."""
        ...

    def set_address(self, name: str, address: int) -> None:
        """Say where an input or output lies."""
        ...

    def enqueue(self) -> None:
        """Start the step on the device's stream.

        Raises:
            EngineError: TensorRT refuses it.
        """
        ...


class Device(Protocol):
    """Device memory and one stream, on which everything happens in order."""

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new memory.

        Raises:
            MemoryError: there is not enough.
        """
        ...

    def free(self, address: int) -> None:
        """Give memory back."""
        ...

    def zero(self, address: int, num_bytes: int) -> None:
        """Fill with zero bytes."""
        ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy from the host; `array` may change afterwards."""
        ...

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy to the host and wait for it."""
        ...

    def open_plan(self, path: Path) -> Plan:
        """Load a compiled engine.

        Raises:
            EngineError: it cannot be loaded.
        """
        ...

    def capture(self, work: Callable[[], None]) -> int:
        """Record what `work` starts as a graph, without running it."""
        ...

    def launch(self, graph: int) -> None:
        """Start a recorded graph."""
        ...

    def close(self) -> None:
        """Give back the stream and what is recorded."""
        ...


def next_power_of_two(value: int, most: int) -> int:
    """Return the least power of two that is at least `value`, but at most `most` (which is at least `value`)."""
    return min(1 << (value - 1).bit_length(), most)


def padded(inputs: StepInputs, *, max_batch_size: int, max_blocks: int) -> StepInputs:
    """Return a step of a bucket's shape: rows, table columns and logits rows that nobody reads are added.

    Padding rows have token 0 at position 0 and slot −1: they change no cache.
    """
    rows, width = inputs.input_ids.shape
    more = next_power_of_two(rows, max(max_batch_size, rows)) - rows
    columns = inputs.block_table.shape[1]
    wider = next_power_of_two(columns, max(max_blocks, columns)) - columns
    count = len(inputs.logits_index)
    longer = next_power_of_two(count, max(max_batch_size * width, count)) - count
    down = ((0, more), (0, 0))
    return StepInputs(
        np.pad(inputs.input_ids, down),
        np.pad(inputs.positions, down),
        np.pad(inputs.slot_mapping, down, constant_values=-1),
        np.pad(inputs.block_table, ((0, more), (0, wider))),
        np.pad(inputs.logits_index, (0, longer)),
        None if inputs.hidden_in is None else np.pad(inputs.hidden_in, (*down, (0, 0))),
        {name: np.pad(value, (*down, (0, 0))) for name, value in inputs.given.items()},
    )


class _Buffer:
    """Device memory that grows."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address = 0
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> bool:
        """Make room; returns whether the address changed."""
        if num_bytes <= self.num_bytes:
            return False
        if self.address:
            self._device.free(self.address)
            self.address = self.num_bytes = 0
        self.address = self._device.allocate(num_bytes)
        self.num_bytes = num_bytes
        return True


class TensorRtStepOutputs:
    """Outputs in device memory, fetched when asked."""

    def __init__(self, device: Device, places: Mapping[str, tuple[int, tuple[int, ...], np.dtype]]) -> None:
        self._device = device
        self._places = places

    def fetch(self, name: str) -> np.ndarray:
        """Copy one output to the host. bf16 becomes f32."""
        address, shape, dtype = self._places[name]
        array = np.empty(shape, dtype)
        self._device.download(array, address)
        return array.astype(np.float32) if dtype == NUMPY["bf16"] else array


class _Graph:
    """One plan with the memory of its inputs and outputs."""

    def __init__(self, backend: TensorRtBackend, name: str, face: GraphIO) -> None:
        self.name, self.face, self.device = name, face, backend.device
        self.plan = backend.device.open_plan(backend.folder / face.file)
        wanted = {spec.name for spec in (*face.inputs, *face.outputs)}
        found = set(self.plan.names())
        if wanted != found:
            odd = sorted(wanted ^ found)[0]
            raise EngineError(
                f"{backend.folder / face.file}: {odd} is only in {'the plan' if odd in found else 'the manifest'}; "
                "build the engine again"
            )
        self.buffers = {
            spec.name: _Buffer(backend.device)
            for spec in (*face.inputs, *face.outputs)
            if spec.role in ("token", "bookkeeping", "result", "tap")
        }
        for spec in face.inputs:
            if spec.role in ("weight", "table"):
                self.plan.set_shape(spec.name, tuple(int(dim) for dim in spec.shape))
                self.plan.set_address(spec.name, backend.constant(name, spec))

    def set_caches(self, caches: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        for spec in self.face.with_role("cache"):
            address, shape = caches[spec.name]
            self.plan.set_shape(spec.name, shape)
            self.plan.set_address(spec.name, address)
        for output, source in self.face.aliases.items():
            self.plan.set_address(output, caches[source][0])

    def place(self, inputs: StepInputs) -> tuple[bool, dict[str, tuple[int, ...]]]:
        """Make room for a step of this shape; returns whether an address changed, and the shapes of the outputs."""
        sizes = {"B": inputs.input_ids.shape[0], "Q": inputs.input_ids.shape[1], "N": len(inputs.logits_index)}
        moved = False
        shapes: dict[str, tuple[int, ...]] = {}
        for spec in self.face.inputs:
            if spec.name in self.buffers:
                moved |= self._reserve(spec, inputs.array(spec.name).shape)
        for spec in self.face.outputs:
            if spec.name in self.buffers:
                shapes[spec.name] = tuple(_size(dim, sizes) for dim in spec.shape)
                moved |= self._reserve(spec, shapes[spec.name])
        return moved, shapes

    def set_shapes(self, inputs: StepInputs) -> None:
        for spec in self.face.inputs:
            if spec.name in self.buffers:
                self.plan.set_shape(spec.name, inputs.array(spec.name).shape)

    def upload(self, inputs: StepInputs) -> None:
        for spec in self.face.inputs:
            if spec.name in self.buffers:
                array = np.ascontiguousarray(inputs.array(spec.name), NUMPY[spec.dtype])
                self.device.upload(self.buffers[spec.name].address, array)

    def _reserve(self, spec: TensorSpec, shape: tuple[int, ...]) -> bool:
        buffer = self.buffers[spec.name]
        moved = buffer.reserve(max(math.prod(shape), 1) * itemsize(spec.dtype))
        if moved:
            self.plan.set_address(spec.name, buffer.address)
        return moved


class TensorRtBackend:
    """A GPU engine. See `Backend`; the MTP graph is loaded when it is first run."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        checkpoint: Path | None = None,
        device: Device | None = None,
    ) -> None:
        """Load the model's plan and its weights.

        Args:
            folder, manifest: the engine.
            threads: not used.
            checkpoint: where the weights are; None takes the folder that the engine was built with.
            device: None opens the GPU.

        Raises:
            EngineError: a plan cannot be loaded, or the checkpoint is another one.
        """
        self.folder = folder
        self.manifest = manifest
        self.device: Device = device if device is not None else _open_gpu(folder, manifest)
        self._bindings = load_bindings(folder) if _BINDINGS in {file.path for file in manifest.files} else {}
        self._checkpoint = checkpoint
        self._source: TensorSource | None = None
        self._constants: dict[str, int] = {}  # recipe -> address: graphs share embedding and head
        self._caches: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._captured: OrderedDict[Bucket, int] = OrderedDict()
        self._seen: set[Bucket] = set()
        self._graphs = {MODEL: _Graph(self, MODEL, manifest.graphs[MODEL])}

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks; earlier ones are given back."""
        self._forget_captured()
        for address, _ in self._caches.values():
            self.device.free(address)
        self._caches.clear()
        per_block = 1 if self.manifest.cache.kv_format == "fp8_ds" else self.manifest.cache.block_size
        for face in self.manifest.graphs.values():
            for spec in face.with_role("cache"):
                shape = (num_blocks * per_block, *(int(dim) for dim in spec.shape[1:]))
                num_bytes = math.prod(shape) * itemsize(spec.dtype)
                address = self.device.allocate(num_bytes)
                self.device.zero(address, num_bytes)
                self._caches[spec.name] = (address, shape)
        for graph in self._graphs.values():
            graph.set_caches(self._caches)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> TensorRtStepOutputs:
        """Run one step; see `Backend.run`."""
        if graph not in self._graphs:
            self._graphs[graph] = self._open(graph)
        one = self._graphs[graph]
        shape = (*inputs.input_ids.shape, len(inputs.logits_index))
        small = inputs.input_ids.shape[1] <= _CAPTURED_WIDTH
        if small:
            limits, size = self.manifest.limits, self.manifest.cache.block_size
            most = blocks_needed(limits.max_model_len, size)
            inputs = padded(inputs, max_batch_size=limits.max_batch_size, max_blocks=most)
        moved, shapes = one.place(inputs)
        if moved:
            self._forget_captured()
        one.upload(inputs)
        bucket = (graph, *inputs.input_ids.shape, inputs.block_table.shape[1], len(inputs.logits_index))
        self._start(one, inputs, bucket if small else None)
        return TensorRtStepOutputs(self.device, self._places(one, shapes, shape, outputs))

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write the weights that read `tensors` into their place: addresses and captured graphs stay valid."""
        made: set[str] = set()
        for recipes in changed_constants(self._bindings, tensors).values():
            for recipe in recipes.values():
                key = _key(recipe)
                if key in self._constants and key not in made:
                    self._upload(recipe, GivenTensors(tensors), self._constants[key])
                    made.add(key)

    def close(self) -> None:
        """Give back plans, weights and caches."""
        self._forget_captured()
        addresses = [*self._constants.values(), *(address for address, _ in self._caches.values())]
        addresses += [b.address for graph in self._graphs.values() for b in graph.buffers.values() if b.address]
        self._graphs.clear()
        for address in addresses:
            self.device.free(address)
        self._constants.clear()
        self._caches.clear()
        self.device.close()

    def constant(self, graph: str, spec: TensorSpec) -> int:
        """Return where a weight lies; it is read from the checkpoint when it is first asked for."""
        try:
            recipe = self._bindings[graph][spec.name]
        except KeyError:
            raise EngineError(
                f"{self.folder / _BINDINGS}: says nothing of {spec.name} of graph {graph}; build the engine again"
            ) from None
        key = _key(recipe)
        if key not in self._constants:
            address = self.device.allocate(math.prod(recipe.shape) * itemsize(recipe.dtype))
            self._upload(recipe, self._tensors(), address)
            self._constants[key] = address
        return self._constants[key]

    def _open(self, graph: str) -> _Graph:
        if graph not in self.manifest.graphs:
            raise EngineError(
                f"{self.folder}: has no graph {graph!r}, only {', '.join(self.manifest.graphs)}; "
                "build it from a program that has one"
            )
        opened = _Graph(self, graph, self.manifest.graphs[graph])
        if self._caches:
            opened.set_caches(self._caches)
        return opened

    def _start(self, graph: _Graph, inputs: StepInputs, bucket: Bucket | None) -> None:
        """Start a step: as it is, or by the graph of its bucket, which is captured when it comes the second time."""
        if bucket in self._captured:
            self._captured.move_to_end(bucket)
            self.device.launch(self._captured[bucket])
            return
        graph.set_shapes(inputs)
        if bucket is None or bucket not in self._seen:
            # TensorRT finishes its preparations for a shape in the first enqueue, which must not be captured
            graph.plan.enqueue()
            if bucket is not None:
                self._seen.add(bucket)
            return
        self._captured[bucket] = self.device.capture(graph.plan.enqueue)
        if len(self._captured) > _MAX_CAPTURED:
            self._captured.popitem(last=False)
        self.device.launch(self._captured[bucket])

    def _forget_captured(self) -> None:
        self._captured.clear()
        self._seen.clear()

    def _places(
        self, graph: _Graph, shapes: Mapping[str, tuple[int, ...]], real: tuple[int, int, int], wanted: Collection[str]
    ) -> dict[str, tuple[int, tuple[int, ...], np.dtype]]:
        """Return where the wanted outputs lie, cut to the rows that are no padding: padding comes last."""
        rows, width, count = real
        places: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        for name in wanted:
            shape = shapes[name]
            if name in ROW_RESULTS:
                first = count
            else:
                first = rows if len(shape) == 3 else rows * width
            dtype = NUMPY[graph.face.named(name).dtype]
            places[name] = (graph.buffers[name].address, (first, *shape[1:]), dtype)
        return places

    def _upload(self, recipe: Recipe, source: TensorSource, address: int) -> None:
        value = np.empty(recipe.shape, NUMPY[recipe.dtype])
        evaluate_into(recipe, source, value)
        self.device.upload(address, value)

    def _tensors(self) -> TensorSource:
        """Return the opened checkpoint; its structure must be the one that the engine was built for."""
        if self._source is None:
            weights = self.manifest.weights
            folder = self._checkpoint or (Path(weights.path) if weights is not None and weights.path else None)
            if folder is None:
                raise EngineError(f"{self.folder}: holds no weights; pass checkpoint, the folder that has them")
            opened = Checkpoint.open(folder)
            wanted = weights.index_digest if weights is not None else None
            if wanted is not None and opened.index_digest() != wanted:
                raise EngineError(f"{folder}: is not the checkpoint that {self.folder} was built for; pass that one")
            self._source = opened
        return self._source


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """Return an axis of an output; "B*Q" is a product."""
    return dim if isinstance(dim, int) else math.prod(sizes[part] for part in dim.split("*"))


def _key(recipe: Recipe) -> str:
    return json.dumps(recipe.to_dict())


def _open_gpu(folder: Path, manifest: Manifest) -> Device:
    from seekforge.runtime.backends.cuda import CudaDevice  # needs a driver and TensorRT

    return CudaDevice(folder, manifest)
