"""Run a CPU engine's graph step by step in ONNX Runtime: the other side of parity and of self-checks at build.

The runtime has its own, faster backend; this one is for proving, takes the same `StepInputs` as
`TorchSession`, and returns every output.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import EngineError
from seekforge.formats.program import GraphIO
from seekforge.formats.step_io import StepInputs


class OrtSession:
    """One graph with its caches, bound in place.

    Args:
        folder: engine folder.
        face: the graph's inputs and outputs.
        num_slots: cache slots (blocks · 64).
        threads: intra-op threads; 0 lets ONNX Runtime choose.
    """

    def __init__(self, folder: Path, face: GraphIO, num_slots: int, *, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = folder / face.file
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            reason = " ".join(str(error).split())
            raise EngineError(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it ({reason}); export the program again"
            ) from error
        self._face = face
        self.caches = {
            spec.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros([num_slots if isinstance(dim, str) else dim for dim in spec.shape], NUMPY[spec.dtype])
            )
            for spec in face.with_role("cache")
        }

    def step(self, inputs: StepInputs, **hidden: np.ndarray) -> dict[str, np.ndarray]:
        """Run one step; caches are updated in place.

        Args:
            inputs: token ids and bookkeeping.
            hidden: `hidden_in` for the MTP graph; `hidden_states` and `residual` for a range that starts later.

        Returns:
            Results and taps by name.
        """
        binding = self._session.io_binding()
        feeds = {
            "input_ids": inputs.input_ids,
            "positions": inputs.positions,
            "slot_mapping": inputs.slot_mapping,
            "block_table": inputs.block_table,
            "logits_index": inputs.logits_index,
            **hidden,
        }
        for spec in self._face.inputs:
            if spec.name in self.caches:
                binding.bind_ortvalue_input(spec.name, self.caches[spec.name])
            else:
                binding.bind_cpu_input(spec.name, np.ascontiguousarray(feeds[spec.name]))
        for spec in self._face.outputs:
            source = self._face.aliases.get(spec.name)
            if source is None:
                binding.bind_output(spec.name)
            else:
                binding.bind_ortvalue_output(spec.name, self.caches[source])
        self._session.run_with_iobinding(binding)
        values = zip(self._face.outputs, binding.get_outputs(), strict=True)
        return {spec.name: value.numpy() for spec, value in values if spec.name not in self._face.aliases}

    def cache(self, name: str) -> np.ndarray:
        """Return a copy of one cache."""
        return self.caches[name].numpy().copy()
