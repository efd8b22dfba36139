"""What a session of ONNX Runtime reads and writes in steps that ask for the same results, bound from step to step.

A short step would else spend more time on binding than on anything of ours. An array that comes again is bound already,
and holds what its owner has written into it since. Results of a step that has the shapes of the one before are written
into the same memory again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import onnxruntime as ort

from seekforge.common.dtypes import NUMPY
from seekforge.formats.program import TensorSpec
from seekforge.formats.step_io import StepInputs
from seekforge.runtime.backends.ort_device import OrtDevice


class _ArrayHolder(Protocol):
    """What ONNX Runtime gives for a result."""

    def numpy(self) -> np.ndarray:
        """Return a copy of the result."""
        ...


class OrtStepOutputs:
    """Results of one step: values of ONNX Runtime, or arrays that the next step overwrites."""

    def __init__(self, values: Mapping[str, _ArrayHolder], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        self._values, self._arrays = values, arrays

    def fetch(self, name: str) -> np.ndarray:
        """Return a copy of one result. It must have been named when the step was run."""
        return self._values[name].numpy() if self._arrays is None else self._arrays[name].copy()


class StepBinding:
    """The values of one session. Caches are bound as inputs and as outputs, so they are written in place.

    Attributes:
        wanted: what a step is asked for, whether this session gives it or not.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device: OrtDevice,
        inputs: Sequence[TensorSpec],
        wanted: frozenset[str],
        results: Sequence[TensorSpec],
        caches: Mapping[str, ort.OrtValue],
        aliases: Mapping[str, str],
    ) -> None:
        """Bind results and caches.

        Args:
            session: what runs.
            device: where its values are.
            inputs: what a step gives.
            wanted: what a step is asked for.
            results: what of it the session gives.
            caches: name of an input -> the cache.
            aliases: output -> the cache that it is written into.
        """
        self.wanted = wanted
        self._session, self._device = session, device
        self._inputs, self._results = inputs, results
        self._given: dict[str, np.ndarray] = {}
        self._on_device: dict[str, ort.OrtValue] = {}
        self._arrays: dict[str, np.ndarray] | None = None  # what results are bound to; None: to memory made in the step
        self._shapes: list[tuple[int, ...]] = []  # of results in the last step
        self._binding = session.io_binding()
        self._bind_fresh()  # first: get_outputs() follows the order of binding
        for name, cache in aliases.items():
            self._binding.bind_ortvalue_output(name, caches[cache])
        for name, value in caches.items():
            self._binding.bind_ortvalue_input(name, value)

    def run(self, inputs: StepInputs) -> OrtStepOutputs:
        """Run one step. A binding whose step failed is not to be used again."""
        same_shapes = self._give(inputs)
        if self._device.holds_inputs:
            self._binding.synchronize_inputs()
        elif same_shapes and self._arrays is None and self._shapes:
            self._bind_arrays()
        elif not same_shapes and self._arrays is not None:
            self._bind_fresh()
        self._session.run_with_iobinding(self._binding)
        if self._arrays is not None:
            return OrtStepOutputs({}, self._arrays)
        made = self._binding.get_outputs_as_ortvaluevector()
        values = {spec.name: made[place] for place, spec in enumerate(self._results)}  # caches were bound behind them
        self._shapes = [tuple(value.shape()) for value in values.values()]
        self._bind_fresh()  # nothing of this step is held here, nor overwritten by the next one
        return OrtStepOutputs(values)

    def _give(self, inputs: StepInputs) -> bool:
        """Bind the arrays of a step that are not bound yet; returns whether all have the shapes of those before."""
        same_shapes = True
        for spec in self._inputs:
            name, array = spec.name, inputs.array(spec.name)
            before = self._given.get(name)
            if self._device.holds_inputs:
                array = np.ascontiguousarray(array)
                value = self._device.value(array, spec.dtype, self._on_device.get(name))
                self._on_device[name] = value
                self._binding.bind_ortvalue_input(name, value)
            elif array is not before:
                array = np.ascontiguousarray(array)
                same_shapes = same_shapes and before is not None and before.shape == array.shape
                self._binding.bind_cpu_input(name, array)
                self._given[name] = array
        return same_shapes

    def _bind_fresh(self) -> None:
        self._arrays = None
        for spec in self._results:
            self._binding.bind_output(spec.name, self._device.memory)

    def _bind_arrays(self) -> None:
        self._arrays = {}
        for spec, shape in zip(self._results, self._shapes, strict=True):
            array = np.empty(shape, NUMPY[spec.dtype])
            self._binding.bind_ortvalue_output(spec.name, self._device.value(array, spec.dtype))
            self._arrays[spec.name] = array
