"""Runs engines of GPU targets with TensorRT or TensorRT-RTX.

Everything lives in device memory: caches, updated in place since a plan's cache output has the address of its input;
weights, streamed from the checkpoint by the engine's bindings through two buffers; inputs and outputs. Steps of few
tokens a row are padded to buckets of (B, Q, table width, logits rows), and each bucket is captured once as a CUDA
graph (`cuda_graphs`): at that size the host's launches would cost more than the kernels.

What touches the device is behind `Device` and `Plan` (`cuda.py` has the real ones): all else is tested without one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from seekforge.common.dtypes import NUMPY, itemsize
from seekforge.common.errors import CheckpointError, EngineError
from seekforge.formats import weight_digests
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.program import GraphIO, load_bindings
from seekforge.formats.step_io import MODEL, ROW_RESULTS, StepInputs
from seekforge.formats.step_runner import StepOutputs
from seekforge.runtime.backends.base import GraphMetrics, OnLoad
from seekforge.runtime.backends.tensorrt.cuda_graphs import CudaGraphs
from seekforge.runtime.backends.tensorrt.device import SHARED, Device
from seekforge.runtime.backends.tensorrt.device_graph import DeviceGraph
from seekforge.runtime.backends.tensorrt.device_weights import DeviceWeights
from seekforge.runtime.backends.tensorrt.part import Part, whole_part
from seekforge.runtime.backends.tensorrt.step_shapes import halves, padded
from seekforge.runtime.backends.weights import GivenTensors, changed_constants
from seekforge.runtime.compatibility import check_weights

#: Rows with at most so many tokens are padded to buckets and captured: decode, and verification of drafts.
_CAPTURED_WIDTH = 8
_BINDINGS = "bindings.json"


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


class HostStepOutputs:
    """Outputs of a step that was run in parts, on the host already."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays

    def fetch(self, name: str) -> np.ndarray:
        """Return one output."""
        return self._arrays[name]


class TensorRtBackend:
    """A GPU engine. See `Backend`; the MTP graph is loaded when it is first run."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        checkpoint: Path | None = None,
        progress: OnLoad | None = None,
        device: Device | None = None,
        part: Part | None = None,
    ) -> None:
        """Load the model's plan and its weights.

        Args:
            folder, manifest: the engine.
            threads: not used.
            checkpoint: where the weights are; None takes the folder that the engine was built with.
            progress: called while weights are loaded.
            device: None opens the first GPU.
            part: what of the engine is run here; None: all of it.

        Raises:
            EngineError: a plan cannot be loaded, or the checkpoint is another one.
        """
        self.folder = folder
        self.manifest = manifest
        self.device: Device = device if device is not None else _open_gpu(folder, manifest)
        if part is None:
            has_bindings = _BINDINGS in {file.path for file in manifest.files}
            part = whole_part(manifest, load_bindings(folder) if has_bindings else {})
        self._part = part
        self._checkpoint = checkpoint
        has_digests = weight_digests.FILE in {file.path for file in manifest.files}
        self._weights = DeviceWeights(
            folder,
            part.bindings,
            self.device,
            self._open_checkpoint,
            progress=progress,
            digests=weight_digests.load_weight_digests(folder) if has_digests else None,
        )
        self._caches: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._captured = CudaGraphs(folder, self.device)
        self._graphs = {MODEL: self._open(MODEL)} if MODEL in part.plans else {}

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks; earlier ones are given back.

        Raises:
            EngineError: the engine was built for fewer.
            MemoryError: there is not enough.
        """
        most = self.manifest.max_cache_blocks()
        if most is not None and num_blocks > most:
            raise EngineError(
                f"{self.folder}: {num_blocks} cache blocks were asked for, the engine was built for at most {most}; "
                f"pass num_blocks={most}, or build it with larger limits"
            )
        self._captured.drop_recorded()
        for address, _ in self._caches.values():
            self.device.free(address)
        self._caches.clear()
        per_block = 1 if self.manifest.cache.kv_format == "fp8_ds" else self.manifest.cache.block_size
        for name in self._part.plans:
            for spec in self._part.whole(name, self.manifest).with_role("cache"):
                shape = (num_blocks * per_block, *(int(dim) for dim in spec.shape[1:]))
                num_bytes = math.prod(shape) * itemsize(spec.dtype)
                address = self.device.allocate(num_bytes)
                self.device.zero(address, num_bytes)
                self._caches[spec.name] = (address, shape)
        for graph in self._graphs.values():
            graph.set_caches(self._caches)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> StepOutputs:
        """Run one step; see `Backend.run`. A step of more rows than any profile takes is run in parts."""
        if graph not in self._graphs:
            self._graphs[graph] = self._open(graph)
        one = self._graphs[graph]
        debug = one.debug.intersection(outputs)
        if debug:
            return self._run_watched(one, inputs, outputs, debug)
        small = inputs.input_ids.shape[1] <= _CAPTURED_WIDTH
        ready = inputs
        if small:
            limits, size = self.manifest.limits, self.manifest.cache.block_size
            most = blocks_needed(limits.max_model_len, size)
            ready = padded(inputs, max_batch_size=limits.max_batch_size, max_blocks=most)
        profile = one.profile_of(ready)
        if profile is None:
            return self._run_halves(inputs, outputs, graph)
        shown = one.taps.intersection(outputs)
        shapes = self._prepare(one, self._received(one, ready), shown)
        bucket = (graph, *ready.input_ids.shape, ready.block_table.shape[1], len(ready.logits_index), shown)
        if small:
            self._captured.start(one, bucket, profile)
        else:
            self._enqueue(one, profile)
        self._hand_on(one)
        return TensorRtStepOutputs(self.device, self._places(one, shapes, inputs, outputs))

    def _received(self, graph: DeviceGraph, inputs: StepInputs) -> StepInputs:
        """Return a step with what the stage before hands on, of a padded step padded as well."""
        if self._part.links is None or not self._part.receives(graph.name):
            return inputs
        return replace(inputs, intermediate_tensors=self._part.links.receive())

    def _hand_on(self, graph: DeviceGraph) -> None:
        """Give the next stage what it takes, when the step is done."""
        specs = self._part.hands_on(graph.name)
        if self._part.links is not None and specs:
            self._part.links.hand_on(graph.handed_on(specs))

    def _prepare(self, graph: DeviceGraph, inputs: StepInputs, shown: frozenset[str]) -> dict[str, tuple[int, ...]]:
        """Make room for a step and copy its inputs; returns the shapes of its outputs."""
        try:
            moved, shapes = graph.place(inputs, shown)
        except MemoryError:  # some buffers may have moved already
            self._captured.drop_recorded()
            raise
        if moved:
            self._captured.drop_recorded()
        graph.upload(inputs)
        return shapes

    def cache(self, name: str) -> np.ndarray:
        """Return a copy of one layer's cache, such as `latent_cache.3`; for parity checks. bf16 becomes f32."""
        address, shape = self._caches[name]
        dtype = NUMPY[next(f.named(name).dtype for f in self.manifest.graphs.values() if name in _names(f))]
        return TensorRtStepOutputs(self.device, {name: (address, shape, dtype)}).fetch(name)

    def _run_watched(
        self, one: DeviceGraph, inputs: StepInputs, outputs: Collection[str], debug: Collection[str]
    ) -> HostStepOutputs:
        """Run a step whose debug tensors are wanted: as it is, without padding and captured graph."""
        profile = one.profile_of(inputs)
        if profile is None:
            return self._run_halves(inputs, outputs, one.name)
        watched: dict[str, np.ndarray] = {}
        shapes = self._prepare(one, self._received(one, inputs), one.taps.intersection(outputs))
        one.watch(debug, watched.__setitem__)
        try:
            self._enqueue(one, profile)
            self.device.synchronize()
        finally:
            one.watch((), watched.__setitem__)
        self._hand_on(one)
        missing = sorted(set(debug) - watched.keys())
        if missing:
            raise EngineError(f"{self.folder}: TensorRT did not show {missing[0]}; build the engine again with --taps")
        kept = [name for name in outputs if name not in debug]
        device = TensorRtStepOutputs(self.device, self._places(one, shapes, inputs, kept))
        return HostStepOutputs(watched | {name: device.fetch(name) for name in kept})

    def _run_halves(self, inputs: StepInputs, outputs: Collection[str], graph: str) -> HostStepOutputs:
        rows, width = inputs.input_ids.shape
        if rows == 1:
            raise EngineError(
                f"{self.folder}: a step of {width} tokens over {inputs.block_table.shape[1]} cache blocks with "
                f"{len(inputs.logits_index)} rows of logits is beyond every profile that the engine was built for; "
                "build it with a larger --max-num-batched-tokens or --max-model-len"
            )
        arrays: dict[str, np.ndarray] = {}
        for part, wanted in halves(inputs):
            results = self.run(part, outputs=outputs, graph=graph)
            for name in outputs:
                value = results.fetch(name)
                if name in ROW_RESULTS:
                    into = arrays.setdefault(name, np.empty((len(inputs.logits_index), *value.shape[1:]), value.dtype))
                    into[wanted] = value[: len(wanted)]
                else:
                    arrays[name] = np.concatenate([arrays[name], value]) if name in arrays else value
        return HostStepOutputs(arrays)

    def graph_metrics(self) -> GraphMetrics:
        """Return what became of CUDA graphs."""
        return self._captured.metrics

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write the weights that read `tensors` into their place: addresses and captured graphs stay valid."""
        self._weights.update(changed_constants(self._part.bindings, tensors), GivenTensors(tensors))

    def write_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write what this rank has of weights that read `tensors`, which were checked for all ranks."""
        self._weights.update(self._part.changed(set(tensors)), GivenTensors(tensors))

    def close(self) -> None:
        """Give back plans, weights and caches."""
        self._captured.close()
        addresses = [address for address, _ in self._caches.values()]
        addresses += [b.address for graph in self._graphs.values() for b in graph.buffers.values() if b.address]
        self._graphs.clear()
        for address in addresses:
            self.device.free(address)
        self._weights.close()
        self._caches.clear()
        self.device.close()

    def _open(self, graph: str) -> DeviceGraph:
        if graph not in self._part.plans:
            raise EngineError(
                f"{self.folder}: has no graph {graph!r}, only {', '.join(self.manifest.graphs)}; "
                "build it from a program that has one"
            )
        self._check_weights(graph)
        self._captured.drop_recorded()  # they work in scratch memory that a larger plan makes move
        graph_io = self._part.whole(graph, self.manifest)
        stages = self._part.plans[graph]
        plans = {Path(stage.file).stem for stage in self.manifest.plans(graph)}  # all ranks capture, or none
        opened = DeviceGraph(
            self.folder,
            graph,
            graph_io,
            stages,
            self.manifest.profiles,
            self.device,
            self._weights.load(graph, [spec.name for spec in graph_io.inputs if spec.role in ("weight", "table")]),
            capturable=all(self.manifest.capturable.get(plan, True) for plan in plans),
            plans=self.manifest.plans(graph),
            received=self._part.receives(graph),
        )
        if self._caches:
            opened.set_caches(self._caches)
        return opened

    def _check_weights(self, graph: str) -> None:
        """Hold the weights and tables of the manifest against the recipes that fill them."""
        for spec in self._part.whole(graph, self.manifest).inputs:
            recipe = self._part.bindings.get(graph, {}).get(spec.name)
            if spec.role not in ("weight", "table") or recipe is None:
                continue
            if (recipe.shape, recipe.dtype) != (spec.shape, spec.dtype):
                raise EngineError(
                    f"{self.folder}: {spec.name} of graph {graph} is {spec.dtype} {list(spec.shape)} in the manifest "
                    f"and {recipe.dtype} {list(recipe.shape)} in {_BINDINGS}; build the engine again"
                )

    @staticmethod
    def _enqueue(graph: DeviceGraph, profile: int) -> None:
        """Start a step as it is: its shapes hardly ever come again, so no kernels are compiled for them."""
        graph.use(profile, SHARED, specialized=False)
        graph.enqueue()

    def _places(
        self,
        graph: DeviceGraph,
        shapes: Mapping[str, tuple[int, ...]],
        real: StepInputs,
        wanted: Collection[str],
    ) -> dict[str, tuple[int, tuple[int, ...], np.dtype]]:
        """Return where the wanted outputs lie, cut to the rows that are no padding: padding comes last."""
        (rows, width), count = real.input_ids.shape, len(real.logits_index)
        places: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        for name in wanted:
            shape = shapes[name]
            if name in ROW_RESULTS:
                first = count
            else:
                first = rows if len(shape) == 3 else rows * width
            dtype = graph.dtypes[name]
            places[name] = (graph.buffers[name].address, (first, *shape[1:]), dtype)
        return places

    def _open_checkpoint(self) -> Checkpoint:
        """Open the checkpoint; its structure must be the one that the engine was built for."""
        weights = self.manifest.weights
        folder = self._checkpoint or (Path(weights.path) if weights is not None and weights.path else None)
        if folder is None:
            raise EngineError(f"{self.folder}: holds no weights; pass checkpoint, the folder that has them")
        try:
            opened = Checkpoint.open(folder)
        except CheckpointError as error:
            if self._checkpoint is not None:
                raise
            raise CheckpointError(
                f"{error}; {self.folder} was built with its weights there: pass --checkpoint, where they are now"
            ) from None
        check_weights(self.folder, self.manifest, opened.index_digest(), folder)
        return opened


def _open_gpu(folder: Path, manifest: Manifest) -> Device:
    from seekforge.runtime.backends.tensorrt.cuda import CudaDevice  # needs a driver and TensorRT

    return CudaDevice(folder, manifest)


def _names(graph_io: GraphIO) -> set[str]:
    return {spec.name for spec in graph_io.inputs}
