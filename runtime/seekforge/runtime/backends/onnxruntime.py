"""Runs engines of target cpu with ONNX Runtime.

A cache is one OrtValue bound as the graph's input and as its output, so ScatterND writes in place; bound to
another output it would be copied whole at every step. Outputs stay OrtValues until fetched: `logits` of a large
batch is 33 MB that greedy decoding never looks at.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from seekforge.common.cores import physical_cores
from seekforge.common.dtypes import NUMPY, ONNX, ONNX_TYPES
from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.program import GraphIO, TensorSpec, load_bindings
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.formats.weight_recipes import QuantizedOnce, Recipe, evaluate_into
from seekforge.plugins.native.library import add_operators
from seekforge.runtime.backends.base import GraphMetrics, OnLoad
from seekforge.runtime.backends.ort_binding import OrtStepOutputs, StepBinding
from seekforge.runtime.backends.ort_device import CPU_PROVIDER, OrtDevice, device_of
from seekforge.runtime.backends.weights import GivenTensors, changed_constants


class OrtGraph:
    """One session with its caches."""

    def __init__(
        self,
        folder: Path,
        name: str,
        graph_io: GraphIO,
        threads: int,
        weights: Mapping[str, ort.OrtValue],
        device: OrtDevice,
    ) -> None:
        self.name = name
        self.caches: dict[str, ort.OrtValue] = {}
        self._device = device
        self._binding: StepBinding | None = None  # of the step before
        self._cache_specs = graph_io.with_role("cache")
        self._results = [spec for spec in graph_io.outputs if spec.name not in graph_io.aliases]
        names = {spec.name for spec in graph_io.outputs}
        self._aliases = {name: cache for name, cache in graph_io.aliases.items() if name in names}
        self._step_inputs = tuple(spec for spec in graph_io.inputs if spec.role != "cache")
        path = folder / graph_io.file
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors: warnings about the graph are for its builder
        options.intra_op_num_threads = threads
        # threads that go on looking for work behind a run take it from the next graph's, which has threads of its own
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if device.provider == CPU_PROVIDER:
            add_operators(options)
        if weights:  # in place of those in the file, before anything is folded or packed
            options.add_external_initializers(list(weights), list(weights.values()))
        try:
            self.session = ort.InferenceSession(str(path), options, providers=device.providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            reason = " ".join(str(error).split())
            raise EngineError(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it ({reason}); build the engine again"
            ) from error
        device.check(self.session.get_providers())
        _check_graph_io(path, "input", self.session.get_inputs(), graph_io.inputs)
        _check_graph_io(path, "output", self.session.get_outputs(), graph_io.outputs)
        self.output_names = tuple(spec.name for spec in graph_io.outputs)
        self.intermediate_outputs = tuple(spec.name for spec in graph_io.outputs if spec.role == "intermediate")

    def allocate_caches(self, num_blocks: int, block_size: int) -> None:
        self.caches.clear()
        self._binding = None
        for spec in self._cache_specs:
            width = spec.shape[-1]
            if len(spec.shape) != 2 or not isinstance(width, int):
                raise EngineError(f"cache {spec.name} has shape {spec.shape}, expected [num_slots, width]; build again")
            # np.zeros takes pages when they are first written: an unused part of the cache costs no memory.
            array = np.zeros((num_blocks * block_size, width), _storage(spec.dtype))
            self.caches[spec.name] = self._device.value(array, spec.dtype)

    def run(self, inputs: StepInputs, outputs: Collection[str]) -> OrtStepOutputs:
        assert self.caches or not self._cache_specs, "allocate_caches comes before run"
        wanted = frozenset(outputs)
        binding, self._binding = self._binding, None  # until the step has gone well
        if binding is None or binding.wanted != wanted:
            results = [spec for spec in self._results if spec.name in wanted]
            if not results and not self._aliases:  # a rank's piece of which nothing is wanted: that behind the logits
                return OrtStepOutputs({})
            binding = StepBinding(
                self.session, self._device, self._step_inputs, wanted, results, self.caches, self._aliases
            )
        step_outputs = binding.run(inputs)
        self._binding = binding
        return step_outputs


class OnnxRuntimeBackend:
    """A CPU engine. The MTP graph is loaded when it is first run."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        checkpoint: Path | None = None,
        progress: OnLoad | None = None,
    ) -> None:
        """Load the model graph; see `BackendFactory`. The weights are in the engine, not in a checkpoint."""
        self._folder = folder
        self._manifest = manifest
        self._threads = threads or physical_cores()
        self._new_weights: dict[str, dict[str, ort.OrtValue]] = {name: {} for name in manifest.graphs}
        self._num_blocks: int | None = None
        self._bindings: dict[str, dict[str, Recipe]] | None = None  # read when weights are first updated
        self._device = device_of(manifest)
        self._graphs = {MODEL: self._open(MODEL)}

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks; earlier ones are given back."""
        self._num_blocks = num_blocks
        for graph in self._graphs.values():
            graph.allocate_caches(num_blocks, self._manifest.cache.block_size)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> OrtStepOutputs:
        """Run one step; see `Backend.run`."""
        if graph not in self._graphs:
            opened = self._open(graph)
            if self._num_blocks is not None:
                opened.allocate_caches(self._num_blocks, self._manifest.cache.block_size)
            self._graphs[graph] = opened
        return self._graphs[graph].run(inputs, outputs)

    def cache(self, name: str) -> np.ndarray:
        """Return a copy of one layer's cache, such as `latent_cache.3`; for parity checks."""
        return next(graph.caches[name] for graph in self._graphs.values() if name in graph.caches).numpy().copy()

    def graph_metrics(self) -> GraphMetrics:
        """Return zeros: there are no CUDA graphs."""
        return GraphMetrics()

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Evaluate the recipes that read `tensors` and open the graphs anew with the results; see `Backend`."""
        if "bindings.json" not in {file.path for file in self._manifest.files}:
            raise EngineError(f"{self._folder}: has no bindings.json, so its weights stay; build the engine again")
        if self._bindings is None:
            self._bindings = load_bindings(self._folder)
        changed = changed_constants(self._bindings, tensors)
        made: dict[str, ort.OrtValue] = {}  # graphs share constants
        source = QuantizedOnce(GivenTensors(tensors))
        weights = {name: dict(values) for name, values in self._new_weights.items()}
        for graph, recipes in changed.items():
            for name, recipe in recipes.items():
                key = json.dumps(recipe.to_dict())
                if key not in made:
                    value = np.empty(recipe.shape, NUMPY[recipe.dtype])
                    evaluate_into(recipe, source, value)
                    made[key] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value, ONNX[recipe.dtype])
                weights[graph][name] = made[key]
        before, self._new_weights = self._new_weights, weights
        try:
            opened = {name: self._open(name) for name in self._graphs if changed.get(name)}
        except BaseException:
            self._new_weights = before
            raise
        for name, graph in opened.items():
            graph.caches = self._graphs[name].caches
        self._graphs.update(opened)

    def close(self) -> None:
        """Give back sessions and caches."""
        self._graphs.clear()

    def _open(self, graph: str) -> OrtGraph:
        if graph not in self._manifest.graphs:
            raise EngineError(
                f"{self._folder}: has no graph {graph!r}, only {', '.join(self._manifest.graphs)}; "
                "build it from a program that has one"
            )
        return OrtGraph(
            self._folder,
            graph,
            self._manifest.graphs[graph],
            self._threads,
            self._new_weights[graph],
            self._device,
        )


def _storage(dtype: str) -> np.dtype:
    """The NumPy type that holds `dtype` in memory; ONNX Runtime refuses ml_dtypes arrays but takes their bits."""
    native = NUMPY[dtype]
    return native if native.isbuiltin == 1 else np.dtype(f"u{native.itemsize}")


def _check_graph_io(path: Path, kind: str, arguments: Sequence[ort.NodeArg], expected: tuple[TensorSpec, ...]) -> None:
    """Compare names, types and shapes of a session with the manifest; order is the manifest's for outputs too."""
    actual = {value.name: value.type for value in arguments}
    wanted = {spec.name: ONNX_TYPES.get(spec.dtype, spec.dtype) for spec in expected}
    for name in wanted.keys() | actual.keys():
        if actual.get(name) != wanted.get(name):
            raise EngineError(
                f"{path}: {kind} {name} is {actual.get(name, 'absent')} in the graph and "
                f"{wanted.get(name, 'absent')} in the manifest; build the engine again"
            )
    shapes = {spec.name: spec.shape for spec in expected if spec.role != "tap"}  # whose sizes nobody relies on
    for value in arguments:
        if value.name not in shapes:
            continue
        shape = tuple(value.shape)
        if len(shape) != len(shapes[value.name]) or not all(map(_is_size, shape, shapes[value.name])):
            raise EngineError(
                f"{path}: {kind} {value.name} has the shape {list(shape)} in the graph and "
                f"{list(shapes[value.name])} in the manifest; build the engine again"
            )


def _is_size(actual: int | str | None, said: int | str) -> bool:
    """Whether an axis of a graph is what a manifest says; a graph need not name its free sizes."""
    return actual == said or (actual is None and not isinstance(said, int)) or (actual is None and said == 0)
