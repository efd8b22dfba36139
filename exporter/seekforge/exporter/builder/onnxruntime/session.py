"""A CPU engine's graphs in ONNX Runtime as something that runs steps: the other side of self-checks at build.

The runtime has its own, faster backend, which the builder does not know; this one returns every output, and runs on the
CPU also what is built for a GPU: any machine builds. Both are a `StepRunner`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime as ort

from seekforge.common.cores import physical_cores
from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import EngineError
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.program import GraphIO
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.plugins.native.library import add_operators


class OrtOutputs(dict[str, np.ndarray]):
    """Outputs of one step as arrays, by name."""

    def fetch(self, name: str) -> np.ndarray:
        """Return one output."""
        return self[name]


class OrtSession:
    """Graphs of one engine with their caches, bound in place.

    Args:
        folder: engine folder.
        graphs: inputs and outputs of the graphs to open, by name.
        num_blocks: size of the paged caches; None: `allocate_caches` comes before the first step.
        threads: intra-op threads; None takes the physical cores that this process may use.
        weights: graph -> constant -> value in place of the one that the file names.

    Raises:
        EngineError: ONNX Runtime cannot load a graph.
    """

    def __init__(
        self,
        folder: Path,
        graphs: Mapping[str, GraphIO],
        num_blocks: int | None = None,
        *,
        threads: int | None = None,
        weights: Mapping[str, Mapping[str, ort.OrtValue]] = MappingProxyType({}),
    ) -> None:
        self._graphs = dict(graphs)
        self._sessions = {
            name: _open(folder / graph.file, threads or physical_cores(), weights.get(name, {}))
            for name, graph in graphs.items()
        }
        #: By name: [NB·64, width].
        self.caches: dict[str, ort.OrtValue] = {}
        if num_blocks is not None:
            self.allocate_caches(num_blocks)

    def output_names(self, graph: str = MODEL) -> list[str]:
        """Return the results and taps that a graph gives."""
        graph_io = self._graphs[graph]
        return [spec.name for spec in graph_io.outputs if spec.name not in graph_io.aliases]

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks; earlier ones are given back."""
        num_slots = num_blocks * BLOCK_SIZE
        self.caches = {
            spec.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros([num_slots if isinstance(size, str) else size for size in spec.shape], NUMPY[spec.dtype])
            )
            for graph in self._graphs.values()
            for spec in graph.with_role("cache")
        }

    def run(self, inputs: StepInputs, *, outputs: Collection[str] | None = None, graph: str = MODEL) -> OrtOutputs:
        """Run one step; caches are updated in place.

        Args:
            inputs: the step.
            outputs: names of results and taps to return; None returns all.
            graph: `MODEL` or `MTP`.
        """
        graph_io, session = self._graphs[graph], self._sessions[graph]
        binding = session.io_binding()
        arrays = {
            spec.name: np.ascontiguousarray(inputs.array(spec.name)) for spec in graph_io.inputs if spec.role != "cache"
        }
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for spec in graph_io.with_role("cache"):
            binding.bind_ortvalue_input(spec.name, self.caches[spec.name])
        for spec in graph_io.outputs:
            cache = graph_io.aliases.get(spec.name)
            if cache is None:
                binding.bind_output(spec.name)
            else:
                binding.bind_ortvalue_output(spec.name, self.caches[cache])
        session.run_with_iobinding(binding)
        values = {spec.name: value for spec, value in zip(graph_io.outputs, binding.get_outputs(), strict=True)}
        names = (name for name in self.output_names(graph) if outputs is None or name in outputs)
        return OrtOutputs({name: values[name].numpy() for name in names})

    def cache(self, name: str) -> np.ndarray:
        """Return a copy of one cache, such as `latent_cache.3`."""
        return self.caches[name].numpy().copy()


def _open(path: Path, threads: int, weights: Mapping[str, ort.OrtValue]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    add_operators(options)
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        reason = " ".join(str(error).split())
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it ({reason}); export the program again"
        ) from error
