"""Walk a program node by node: standard operators through torch, custom ones through the very `plugin.enqueue`.

The nearest thing to an engine where no TensorRT runs. Plugins are made by the registered creators, from
fields, in the run-time phase, as a deserialized engine makes them; launchers come from a kernel folder; pointers,
aliases and workspace are those that TensorRT would pass. Where tensors live and how launches run is a `Place`: a GPU
(`CudaPlace`), or host memory and Triton's interpreter (`HostPlace`), so the same walk is tested without a GPU.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Protocol

import onnx
import torch
from onnx import numpy_helper
from tests.support.host_device import (
    STREAM,
    HostDriver,
    check_guard,
    guarded,
)
from tests.support.standard_ops import attributes, run_standard
from torch import Tensor

from seekforge.common.errors import EnvironmentFault, ProgramError
from seekforge.exporter.models.shared.weights import to_torch
from seekforge.plugins.kernels.index import LauncherSource
from seekforge.plugins.kernels.launcher import CudaDriver, Driver
from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.registry import SPECS
from seekforge.plugins.tensorrt.library import load
from seekforge.plugins.tensorrt.plugin import KERNEL_DIGEST, OP_VERSION, PRODUCTS, make_fields, register
from seekforge.plugins.torch_ops import DTYPE_NAMES, TORCH_DTYPES

#: What TensorRT gives as alignment of every buffer.
ALIGNMENT: Final = 256


#: Told a node's name, its plugin, inputs and outputs.
Check = Callable[[str, Any, list[Tensor], list[Tensor]], None]


class Place(Protocol):
    """Where a walk happens."""

    device: torch.device
    driver: Driver
    sm: int

    @property
    def stream(self) -> int:
        """Handle of the stream that torch and plugins use."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an aligned buffer that nobody has written."""
        ...

    def call(self, work: Callable[[], None], *, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Run one plugin that may read `read` and write `written`."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record a step; the result replays it on the same buffers."""
        ...

    def seconds(self, work: Callable[[], None], repeats: int) -> float:
        """Return the mean time of `work`."""
        ...


class HostPlace:
    """Host memory and Triton's interpreter. A recorded step is run anew: there are no graphs here."""

    device = torch.device("cpu")
    stream = STREAM

    def __init__(self, sm: int = 90) -> None:
        self.driver, self.sm = HostDriver(), sm

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a poisoned and guarded buffer."""
        return guarded(shape, dtype)

    def call(self, work: Callable[[], None], *, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Allow the plugin its own buffers only, and look behind those that it wrote."""
        self.driver.memory = {one.data_ptr(): one.nbytes for one in (*read, *written)}
        work()
        for one in written:
            check_guard(one)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return `work`."""
        return work

    def seconds(self, work: Callable[[], None], repeats: int) -> float:
        """Time one run."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


class CudaPlace:
    """The first GPU, through torch's stream, allocator and graphs. Needs torch with CUDA."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise EnvironmentFault(
                f"the graph walker runs standard operators in torch, and torch {torch.__version__} sees no GPU; "
                "install a CUDA build of torch on a machine with a GPU"
            )
        self.device = torch.device("cuda", 0)
        torch.cuda.set_stream(torch.cuda.Stream())  # as an engine does: not the default stream, which waits for others
        torch.zeros(1, device=self.device)  # makes torch's context the current one, in which kernels are loaded
        self.driver = CudaDriver()
        major, minor = torch.cuda.get_device_capability(0)
        self.sm = 10 * major + minor

    @property
    def stream(self) -> int:
        """Return the current stream: inside a capture, that of the capture."""
        return torch.cuda.current_stream().cuda_stream

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a buffer of torch's allocator, which aligns to 512 bytes."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def call(self, work: Callable[[], None], *, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Run the plugin."""
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record a CUDA graph after a warm-up on a side stream, as torch asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def seconds(self, work: Callable[[], None], repeats: int) -> float:
        """Time by events around all repeats."""
        work()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats


def plugin_module() -> Any:
    """Return TensorRT-RTX where it is installed, else a stand-in with the same names."""
    try:
        return load("tensorrt-rtx")
    except EnvironmentFault:
        return importlib.import_module("tests.support.stand_in_trt")


@dataclass(frozen=True)
class _Step:
    """One node, ready to run. `last` are values that nobody reads after it."""

    node: onnx.NodeProto
    attrs: dict[str, Any]
    plugin: Any
    last: tuple[str, ...]


class Walker:
    """A prepared program with its weights.

    Args:
        model: from `build.prepare`, every custom node a plugin.
        weights: weight input -> tensor on the place's device, in the dtype that the program says.
        place: where it is walked.
        source: gives the launchers.
        trt: module whose plugin classes are used; None takes `plugin_module`.

    Raises:
        EngineError: a plugin finds no kernels.
        ProgramError: a custom node is none of ours, or weights are missing.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        weights: Mapping[str, Tensor],
        place: Place,
        source: LauncherSource,
        *,
        trt: Any = None,
    ) -> None:
        self.place, self.weights = place, dict(weights)
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self.constants = {one.name: to_torch(numpy_helper.to_array(one)) for one in model.graph.initializer}
        self._workspace = place.empty((0,), torch.uint8)
        module = plugin_module() if trt is None else trt
        self.module = module.__name__
        register(module, source)
        try:
            self._steps = self._prepare(model, module)
        finally:
            register(module)

    def _prepare(self, model: onnx.ModelProto, trt: Any) -> list[_Step]:
        kept = set(self.outputs)
        steps = []
        for node in reversed(model.graph.node):
            names = {name for name in (*node.input, *node.output) if name}
            last = tuple(sorted(names - kept))
            kept |= names
            attrs = attributes(node)
            plugin = _make_plugin(trt, node, attrs) if node.domain == DOMAIN else None
            steps.append(_Step(node, attrs, plugin, last))
        return steps[::-1]

    def run(self, inputs: Mapping[str, Tensor], check: Check | None = None) -> dict[str, Tensor]:
        """Run one step.

        Args:
            inputs: every graph input that is no weight, on the place's device. Caches are updated in place.
            check: told every custom node with host copies of its inputs (as they were before) and outputs.

        Returns:
            Every output by name; a cache output is its input.
        """
        values: dict[str, Tensor] = self.constants | self.weights | dict(inputs)
        missing = [name for name in self.inputs if name not in values]
        if missing:
            raise ProgramError(f"graph walker: {len(missing)} inputs are missing, the first is {missing[0]}")
        for step in self._steps:
            node = step.node
            arguments = [values[name] if name else None for name in node.input]
            if step.plugin is None:
                results = run_standard(node.op_type, arguments, step.attrs)
            else:
                tensors = [one for one in arguments if one is not None]
                before = [] if check is None else [one.detach().to("cpu", copy=True) for one in tensors]
                results = self._enqueue(step.plugin, tensors)
                if check is not None:
                    check(node.name, step.plugin, before, [one.to("cpu", copy=True) for one in results])
            for name, result in zip(node.output, results):
                values[name] = result
            for name in step.last:
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}

    def _enqueue(self, plugin: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Call one plugin as TensorRT does: linear, aligned buffers, aliased outputs at the address of their input."""
        spec, place = plugin.spec, self.place
        aliases = dict(spec.aliases)
        inputs = {}
        for name, tensor in spec.named(tensors).items():
            if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
                inputs[name] = tensor
                continue
            assert name not in aliases.values(), f"{spec.name}: {name} is updated in place, but not aligned"
            inputs[name] = place.empty(tensor.shape, tensor.dtype).copy_(tensor)
        shapes = [tuple(one.shape) for one in inputs.values()]
        kinds = {name: DTYPE_NAMES[one.dtype] for name, one in inputs.items()}
        outputs, fresh = [], []
        described = zip(
            spec.outputs,
            spec.output_shapes(spec.bind(shapes, plugin.attrs)),
            spec.output_dtypes(kinds),
            strict=True,
        )
        for arg, shape, kind in described:
            if arg.name in aliases:
                outputs.append(inputs[aliases[arg.name]])
                continue
            outputs.append(place.empty(shape, TORCH_DTYPES[kind]))
            fresh.append(outputs[-1])
        size = plugin.get_workspace_size([SimpleNamespace(max=shape) for shape in shapes], [])
        if size > self._workspace.numel():
            self._workspace = place.empty((size,), torch.uint8)

        def work() -> None:
            plugin.enqueue(
                [SimpleNamespace(dims=shape) for shape in shapes],
                [SimpleNamespace(dims=tuple(one.shape)) for one in outputs],
                [one.data_ptr() for one in inputs.values()],
                [one.data_ptr() for one in outputs],
                self._workspace.data_ptr(),
                place.stream,
            )

        place.call(work, read=list(inputs.values()), written=[*fresh, self._workspace])
        return tuple(outputs)


def _make_plugin(trt: Any, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> Any:
    """Make a plugin as the run time does when it reads a plan: from fields, in the run-time phase, then attached."""
    spec = SPECS.get(node.op_type)
    if spec is None:
        raise ProgramError(f"graph walker: {node.name} is {node.op_type}, which is no operator of {DOMAIN}")
    names = [attr.name for attr in spec.attrs] + [PRODUCTS, KERNEL_DIGEST, OP_VERSION]
    fields, kept = make_fields(trt, {name: attrs[name] for name in names})
    creator = trt.get_plugin_registry().get_creator(spec.name, "1", DOMAIN)
    plugin = creator.create_plugin(node.name, fields, trt.TensorRTPhase.RUNTIME)
    assert kept, "fields only point at their data"
    return plugin.attach_to_context(None)


class CapturedStep:
    """One step of fixed shapes, recorded once and replayed on new inputs.

    Args:
        walker: the walker of the program.
        inputs: first inputs; the caches among them are the ones that every replay updates.
        caches: names of the inputs that are updated in place.
    """

    def __init__(self, walker: Walker, inputs: Mapping[str, Tensor], caches: Sequence[str]) -> None:
        self._inputs = {name: one if name in caches else one.clone() for name, one in inputs.items()}
        self._caches = {name: self._inputs[name] for name in caches}
        before = {name: one.clone() for name, one in self._caches.items()}
        self._outputs: dict[str, Tensor] = {}

        def work() -> None:
            self._outputs = walker.run(self._inputs)

        self.replay = walker.place.capture(work)
        for name, one in before.items():  # warming up and recording may have written there
            self._caches[name].copy_(one)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy new inputs (all but the caches) into the recorded buffers, replay, and return the recorded outputs."""
        for name, one in inputs.items():
            if name not in self._caches:
                self._inputs[name].copy_(one)
        self.replay()
        return self._outputs
