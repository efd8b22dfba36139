"""The device of `backends/tensorrt.py` on a real GPU: CUDA memory, one stream, TensorRT contexts. No decisions here.

Nothing of this file runs without a GPU, so it holds device calls only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from seekforge.plugins.errors import EngineError, EnvironmentFault
from seekforge.plugins.formats.manifest import Manifest
from seekforge.plugins.tensorrt.launch import LauncherSource
from seekforge.plugins.tensorrt.library import Flavour, load
from seekforge.plugins.tensorrt.plugin import register

#: Compiled kernels that TensorRT-RTX keeps between starts, in the engine folder.
_RUNTIME_CACHE = "runtime.cache"


class TrtPlan:
    """A deserialised engine with one execution context."""

    def __init__(self, device: CudaDevice, path: Path) -> None:
        self._stream = device.stream
        self._path = path
        runtime = device.trt.Runtime(device.trt.Logger(device.trt.Logger.ERROR))
        self._runtime = runtime  # must outlive the engine
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(f"{path}: TensorRT {device.trt.__version__} cannot load it; build the engine again here")
        self._cache: Any = None
        if device.flavour == "tensorrt-rtx":
            config = self._engine.create_runtime_config()
            self._cache = config.create_runtime_cache()
            stored = path.parent / _RUNTIME_CACHE
            if stored.is_file():
                self._cache.deserialize(stored.read_bytes())
            config.set_runtime_cache(self._cache)
            self._context = self._engine.create_execution_context(config)
        else:
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise MemoryError

    def names(self) -> list[str]:
        """Names of all inputs and outputs."""
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input."""
        if not self._context.set_input_shape(name, shape):
            raise EngineError(f"{self._path}: shape {shape} of {name} is outside what the engine was built for")

    def set_address(self, name: str, address: int) -> None:
        """Say where an input or output lies."""
        self._context.set_tensor_address(name, address)

    def enqueue(self) -> None:
        """Start the step."""
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"{self._path}: TensorRT refused a step; see its log")

    def save_runtime_cache(self) -> None:
        """Keep what TensorRT-RTX compiled, so that the next start is quick; a read-only folder stays as it is."""
        if self._cache is not None:
            try:
                (self._path.parent / _RUNTIME_CACHE).write_bytes(bytes(self._cache.serialize()))
            except OSError:
                return


class CudaDevice:
    """The first GPU. See `tensorrt.Device`."""

    def __init__(self, folder: Path, manifest: Manifest, source: LauncherSource | None = None) -> None:
        """Load TensorRT, register the plugins and make a stream.

        Args:
            folder, manifest: the engine.
            source: gives the kernels of its plugins.

        Raises:
            EnvironmentFault: TensorRT, its GPU or the CUDA bindings are missing.
        """
        self.flavour: Flavour = "tensorrt-rtx" if manifest.target.backend == "tensorrt-rtx" else "tensorrt"
        self.trt = load(self.flavour)
        try:
            from cuda.bindings import runtime as cudart  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError:
            raise EnvironmentFault("cuda-bindings is not installed; pip install 'seekforge[gpu]'") from None
        self._cuda: Any = cudart
        register(self.trt, source)
        self.stream = int(self._call(cudart.cudaStreamCreateWithFlags, 1))  # 1: not blocking
        self._graphs: dict[int, Any] = {}
        self._plans: list[TrtPlan] = []

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new memory."""
        error, address = self._cuda.cudaMalloc(num_bytes)
        if int(error) == 2:  # cudaErrorMemoryAllocation
            raise MemoryError(f"{num_bytes:,} bytes of GPU memory are not free")
        self._check(error)
        return int(address)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call(self._cuda.cudaFree, address)

    def zero(self, address: int, num_bytes: int) -> None:
        """Fill with zero bytes."""
        self._call(self._cuda.cudaMemsetAsync, address, 0, num_bytes, self.stream)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy from pageable host memory, which CUDA has read when the call returns."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy to the host and wait."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, self.stream)
        self._call(self._cuda.cudaStreamSynchronize, self.stream)

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
        finally:
            graph = self._call(self._cuda.cudaStreamEndCapture, self.stream)
        recorded = self._call(self._cuda.cudaGraphInstantiate, graph, 0)
        self._call(self._cuda.cudaGraphDestroy, graph)
        number = len(self._graphs) + 1
        self._graphs[number] = recorded
        return number

    def launch(self, graph: int) -> None:
        """Start a recorded graph."""
        self._call(self._cuda.cudaGraphLaunch, self._graphs[graph], self.stream)

    def close(self) -> None:
        """Give back the stream and the graphs."""
        self._call(self._cuda.cudaStreamSynchronize, self.stream)
        for plan in self._plans:
            plan.save_runtime_cache()
        for recorded in self._graphs.values():
            self._call(self._cuda.cudaGraphExecDestroy, recorded)
        self._graphs.clear()
        self._plans.clear()
        self._call(self._cuda.cudaStreamDestroy, self.stream)

    def _call(self, function: Any, *arguments: Any) -> Any:
        error, *values = function(*arguments)
        self._check(error)
        return values[0] if values else None

    def _check(self, error: Any) -> None:
        if int(error):
            _, text = self._cuda.cudaGetErrorString(error)
            raise EngineError(f"CUDA: {text.decode() if isinstance(text, bytes) else text}; the GPU step failed")
