"""The device of `backends/tensorrt.py` on a real GPU: CUDA memory, one stream, TensorRT contexts. No decisions here.

Nothing of this file runs without a GPU, so it holds device calls only; tests drive it with libraries that record.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from seekforge.plugins.device import CudaDriver, KernelFolder
from seekforge.plugins.errors import EngineError, EnvironmentFault
from seekforge.plugins.formats.dtypes import NUMPY
from seekforge.plugins.formats.loading import check_loadable, installed_versions
from seekforge.plugins.formats.manifest import Manifest
from seekforge.plugins.tensorrt.library import Flavour, load
from seekforge.plugins.tensorrt.plugin import register
from seekforge.runtime.backends.device import Call

#: Ending of the file beside a plan in which TensorRT-RTX keeps between starts what it compiled.
_RUNTIME_CACHE = ".runtime-cache"
#: Values of CUDA's enumerations that are passed as plain numbers.
_NON_BLOCKING, _OUT_OF_MEMORY, _HOST_ALLOC_DEFAULT = 1, 2, 0


class _Context:
    """One execution context, and what it was told last."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.watched: frozenset[str] = frozenset()
        self.scratch: tuple[int, int] = (0, 0)
        self.listener: Any = None  # the context does not keep it


def _listener(device: CudaDevice, seen: Callable[[str, np.ndarray], None]) -> Any:
    """Return TensorRT's listener of debug tensors, which copies each to the host."""
    trt = device.trt

    class Listener(trt.IDebugListener):
        def process_debug_tensor(self, addr: Any, location: Any, type: Any, shape: Any, name: str, stream: int) -> bool:
            word = {"FLOAT": "f32", "BF16": "bf16", "INT32": "i32", "INT64": "i64"}[type.name]
            value = np.empty(tuple(shape), NUMPY[word])
            if location == trt.TensorLocation.DEVICE:
                device.download(value, int(addr))
            else:
                ctypes.memmove(value.ctypes.data, int(addr), value.nbytes)
            seen(name, value.astype(np.float32) if word == "bf16" else value)
            return True

    return Listener()


class TrtPlan:
    """A deserialised engine with one execution context per optimisation profile.

    A context runs one call after the other. TensorRT reads addresses and shapes while it enqueues, so the next call
    may have others although the last one still runs on the stream; of 57 layers that are alike, shapes are told once.
    """

    def __init__(self, device: CudaDevice, path: Path) -> None:
        self._device, self._path = device, path
        runtime = device.trt.Runtime(device.trt.Logger(device.trt.Logger.ERROR))
        self._runtime = runtime  # must outlive the engine
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            fault = device.registration.failures[-1:] or [f"TensorRT {device.trt.__version__} cannot load it"]
            raise EngineError(f"{path}: {fault[0]}; build the engine again here")
        self._cache = self._runtime_cache()
        profiles = range(self._engine.num_optimization_profiles)
        device.reserve_scratch(max(self._engine.get_device_memory_size_for_profile_v2(number) for number in profiles))
        self._contexts: dict[int, _Context] = {}
        self._seen: Callable[[str, np.ndarray], None] = lambda name, value: None

    def names(self) -> list[str]:
        """Names of all inputs and outputs."""
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def enqueue(self, call: Call) -> None:
        """Start a run."""
        one = self._contexts.get(call.profile)
        if one is None:
            one = self._contexts[call.profile] = self._open(call.profile)
        if one.scratch != self._device.scratch:
            one.context.set_device_memory(*self._device.scratch)
            one.scratch = self._device.scratch
        if one.addresses != call.addresses:
            for name, address in call.addresses.items():
                if one.addresses.get(name) != address:
                    one.context.set_tensor_address(name, address)
            one.addresses = dict(call.addresses)
        if one.shapes != call.shapes:
            for name, shape in call.shapes.items():
                if one.shapes.get(name) != shape and not one.context.set_input_shape(name, shape):
                    one.shapes = {}  # which of them it took is not known
                    raise EngineError(f"{self._path}: shape {shape} of {name} is outside what the engine was built for")
            one.shapes = dict(call.shapes)
        self._seen = call.seen
        if one.watched != call.watched:
            self._listen(one, call.watched)
        if not one.context.execute_async_v3(self._device.stream):
            fault = self._device.registration.failures[-1:] or ["TensorRT refused a step"]
            raise EngineError(f"{self._path}: {fault[0]}")

    def _listen(self, one: _Context, watched: frozenset[str]) -> None:
        """Turn debug tensors of a context on and off."""
        if one.listener is None:
            one.listener = _listener(self._device, lambda name, value: self._seen(name, value))
            one.context.set_debug_listener(one.listener)
        for name in one.watched ^ watched:
            if not one.context.set_tensor_debug_state(name, name in watched):
                raise EngineError(f"{self._path}: has no debug tensor {name}; build the engine again with --taps")
        one.watched = watched

    def close(self) -> None:
        """Keep what TensorRT-RTX compiled, so that the next start is quick; a read-only folder stays as it is."""
        if self._cache is not None:
            stored = self._path.with_suffix(_RUNTIME_CACHE)
            with contextlib.suppress(OSError):
                unfinished = stored.with_name(f"{stored.name}.{os.getpid()}")
                unfinished.write_bytes(bytes(self._cache.serialize()))
                unfinished.replace(stored)
        self._contexts.clear()

    def _open(self, profile: int) -> _Context:
        strategy = self._device.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is not None:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.set_runtime_cache(self._cache)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise MemoryError(f"{self._path}: no memory for an execution context")
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise EngineError(f"{self._path}: has no optimisation profile {profile}; build the engine again")
        return _Context(context)

    def _runtime_cache(self) -> Any:
        """Return what TensorRT-RTX compiles for this GPU, read back from the last start; None with TensorRT."""
        if self._device.flavour != "tensorrt-rtx":
            return None
        cache = self._engine.create_runtime_config().create_runtime_cache()
        stored = self._path.with_suffix(_RUNTIME_CACHE)
        if stored.is_file():
            cache.deserialize(stored.read_bytes())
        return cache


class CudaDevice:
    """The first GPU. See `device.Device`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Check that the engine can run on this GPU, register its plugins with their kernels, and make a stream.

        Args:
            folder, manifest: the engine.

        Raises:
            EngineError: the engine is for another GPU or other versions, or its kernels are missing.
            EnvironmentFault: TensorRT, a GPU or the CUDA bindings are missing.
        """
        self.flavour: Flavour = "tensorrt-rtx" if manifest.target.backend == "tensorrt-rtx" else "tensorrt"
        try:
            from cuda.bindings import runtime as cudart  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError:
            raise EnvironmentFault("cuda-bindings is not installed; pip install 'seekforge[gpu]'") from None
        self._cuda: Any = cudart
        self._graphs: dict[int, Any] = {}
        self._next_graph = 1
        self._plans: list[TrtPlan] = []
        self.scratch = (0, 0)
        self._pinned: list[int] = []
        sm = self._open_gpu()
        check_loadable(folder, manifest, sm=sm, versions=installed_versions(manifest.runtime_versions))
        self.trt = load(self.flavour)
        source = KernelFolder(folder, sm, CudaDriver()) if manifest.plugins else None
        self.registration = register(self.trt, source)
        self.stream = int(self._call(cudart.cudaStreamCreateWithFlags, _NON_BLOCKING))

    def _open_gpu(self) -> int:
        """Make the first GPU's context current and return its compute capability, 89 for an L40S."""
        error, count = self._cuda.cudaGetDeviceCount()
        if int(error) or not count:
            raise EnvironmentFault("no NVIDIA GPU answers here; run this engine on the machine with its GPU")
        self._call(self._cuda.cudaSetDevice, 0)
        self._call(self._cuda.cudaFree, 0)  # the first call that needs a context makes it
        attribute = self._cuda.cudaDeviceAttr
        major = self._call(self._cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call(self._cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMinor, 0)
        return 10 * int(major) + int(minor)

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new memory."""
        return self._allocated(self._cuda.cudaMalloc(num_bytes), num_bytes, "GPU")

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call(self._cuda.cudaFree, address)

    def zero(self, address: int, num_bytes: int) -> None:
        """Fill with zero bytes."""
        self._call(self._cuda.cudaMemsetAsync, address, 0, num_bytes, self.stream)

    def staging(self, num_bytes: int) -> np.ndarray:
        """Return page-locked host memory, uint8[num_bytes]; it lives as long as the device."""
        made = self._cuda.cudaHostAlloc(num_bytes, _HOST_ALLOC_DEFAULT)
        address = self._allocated(made, num_bytes, "page-locked host")
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy from pageable host memory, which CUDA has read when the call returns."""
        self.upload_staged(address, array)

    def upload_staged(self, address: int, array: np.ndarray) -> None:
        """Start a copy from memory of `staging`; it must not change before `synchronize`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy to the host and wait."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for everything that was started."""
        self._call(self._cuda.cudaStreamSynchronize, self.stream)

    def reserve_scratch(self, num_bytes: int) -> None:
        """Make room for what a plan needs while it runs: all share it, since they run one after the other.

        No graph may be captured when a plan is opened: graphs work in the scratch memory that they were captured with.
        """
        assert not self._graphs
        address, size = self.scratch
        if num_bytes > size or not address:
            self.scratch = (self.allocate(max(num_bytes, 1)), num_bytes)
            if address:
                self.free(address)

    def open_plan(self, path: Path) -> TrtPlan:
        """Load a compiled engine."""
        plan = TrtPlan(self, path)
        self._plans.append(plan)
        return plan

    def capture(self, work: Callable[[], None]) -> int:
        """Record what `work` starts as a graph."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture, self.stream, mode)
        try:
            work()
        except BaseException:
            self._cuda.cudaStreamEndCapture(self.stream)  # ends the capture; what went wrong is raised, not this
            raise
        graph = self._call(self._cuda.cudaStreamEndCapture, self.stream)
        recorded = self._call(self._cuda.cudaGraphInstantiate, graph, 0)
        self._call(self._cuda.cudaGraphDestroy, graph)
        number, self._next_graph = self._next_graph, self._next_graph + 1
        self._graphs[number] = recorded
        return number

    def launch(self, graph: int) -> None:
        """Start a recorded graph."""
        self._call(self._cuda.cudaGraphLaunch, self._graphs[graph], self.stream)

    def forget(self, graph: int) -> None:
        """Give back a recorded graph."""
        self._call(self._cuda.cudaGraphExecDestroy, self._graphs.pop(graph))

    def close(self) -> None:
        """Give back plans, graphs, page-locked memory and the stream."""
        self.synchronize()
        for graph in list(self._graphs):
            self.forget(graph)
        for plan in self._plans:
            plan.close()
        self._plans.clear()
        if self.scratch[0]:
            self.free(self.scratch[0])
            self.scratch = (0, 0)
        for address in self._pinned:
            self._call(self._cuda.cudaFreeHost, address)
        self._pinned.clear()
        self._call(self._cuda.cudaStreamDestroy, self.stream)

    def _allocated(self, result: tuple[Any, Any], num_bytes: int, kind: str) -> int:
        error, address = result
        if int(error) == _OUT_OF_MEMORY:
            self._cuda.cudaGetLastError()  # this error is not sticky, but it is remembered
            raise MemoryError(f"{num_bytes:,} bytes of {kind} memory are not free")
        self._check(error)
        return int(address)

    def _call(self, function: Any, *arguments: Any) -> Any:
        error, *values = function(*arguments)
        self._check(error)
        return values[0] if values else None

    def _check(self, error: Any) -> None:
        if int(error):
            _, text = self._cuda.cudaGetErrorString(error)
            raise EngineError(f"CUDA: {text.decode() if isinstance(text, bytes) else text}; the GPU step failed")
