"""A step in which every token appears twice, so that what a token gives does not depend on the others.

ONNX Runtime's CPU products give a row the same bits among any number of rows, except alone: a product of one row sums
in another order. A head works on the Q tokens of a sequence, an expert on the tokens routed to it, of which there may
be one. With every token doubled in its sequence (the second writes to no cache) no product ever has a single row,
whatever the batch, the chunk and the routing. Our own product of few rows is left out (`keep_row_bits`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

import numpy as np

from seekforge.formats.step_io import MODEL, ROW_RESULTS, StepInputs
from seekforge.formats.step_runner import StepOutputs
from seekforge.plugins.native.library import keep_row_bits
from seekforge.runtime.backends.base import Backend, GraphMetrics, fault_of


class _WithoutDoubles:
    """Outputs of the tokens that were asked for."""

    def __init__(self, outputs: StepOutputs, shape: tuple[int, ...]) -> None:
        self._outputs = outputs
        self._num_rows, self._width = shape

    def fetch(self, name: str) -> np.ndarray:
        """Return one output."""
        if name == "logsumexp":  # the engine may split the sum over threads, by how many rows there are
            return _logsumexp(self.fetch("logits"))
        value = self._outputs.fetch(name)
        if name in ROW_RESULTS:
            return value[: len(value) // 2]
        per_token = value.reshape(self._num_rows, 2 * self._width, *value.shape[value.ndim - 1 :])[:, : self._width]
        return per_token if value.ndim == 3 else per_token.reshape(-1, value.shape[-1])


class DeterministicBackend:
    """Runs another backend with doubled tokens; twice the work."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._release = contextlib.ExitStack()
        keep_row_bits(True)
        self._release.callback(keep_row_bits, False)

    def allocate_caches(self, num_blocks: int) -> None:
        """Make caches; see `Backend`."""
        self._backend.allocate_caches(num_blocks)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> StepOutputs:
        """Run one step; see `Backend.run`."""
        if "logsumexp" in outputs:
            outputs = {*outputs, "logits"} - {"logsumexp"}
        return _WithoutDoubles(self._backend.run(doubled(inputs), outputs=outputs, graph=graph), inputs.input_ids.shape)

    @property
    def fault(self) -> str | None:
        """Why no step can be run any more; None: one can."""
        return fault_of(self._backend)

    def graph_metrics(self) -> GraphMetrics:
        """Return what became of CUDA graphs."""
        return self._backend.graph_metrics()

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Swap weights; see `Backend`."""
        self._backend.update_weights(tensors)

    def close(self) -> None:
        """Give back sessions and caches."""
        self._release.close()
        self._backend.close()


def doubled(inputs: StepInputs) -> StepInputs:
    """Return `inputs` with every token twice, the second after all first ones of its row: it writes nothing, and gives
    logits where the first does."""
    width = inputs.input_ids.shape[1]
    index = inputs.logits_index + inputs.logits_index // width * width
    return StepInputs(
        _twice(inputs.input_ids),
        _twice(inputs.positions),
        np.concatenate([inputs.slot_mapping, np.full_like(inputs.slot_mapping, -1)], axis=1),
        inputs.block_table,
        np.concatenate([index, index + width]),
        None if inputs.hidden_in is None else _twice(inputs.hidden_in),
    )


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    """[N, V] f32 -> [N] f32, each row summed by itself in f64."""
    peak = logits.max(-1).astype(np.float64)
    return (peak + np.log(np.exp(logits - peak[:, None]).sum(-1))).astype(np.float32)


def _twice(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, values], axis=1)
