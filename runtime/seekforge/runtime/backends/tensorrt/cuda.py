"""The device of `tensorrt/backend.py` on a real GPU: CUDA memory, one stream, graphs. No decisions here.

Nothing of this file runs without a GPU, so it holds device calls only; tests drive it with libraries that record.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.common.requirements import install
from seekforge.formats.engine.manifest import Manifest
from seekforge.plugins.kernels.cuda_driver import startup_fault
from seekforge.plugins.kernels.launcher import CudaDriver, KernelFolder
from seekforge.plugins.tensorrt.library import Flavour, load
from seekforge.plugins.tensorrt.plugin import register
from seekforge.runtime.backends.tensorrt.device import Group, Join
from seekforge.runtime.backends.tensorrt.plan import TrtPlan, library_log
from seekforge.runtime.backends.tensorrt.waiting import SilentGpuError, await_stream
from seekforge.runtime.compatibility import check_driver, check_loadable, installed_versions

#: Values of CUDA's enumerations that are passed as plain numbers.
_NON_BLOCKING, _OUT_OF_MEMORY, _HOST_ALLOC_DEFAULT, _NO_DEVICE, _NOT_READY = 1, 2, 0, 100, 600


class CudaDevice:
    """One GPU. See `device.Device`."""

    def __init__(self, folder: Path, manifest: Manifest, *, number: int = 0, join: Join | None = None) -> None:
        """Check that the engine can run on this GPU, register its plugins with their kernels, and make a stream.

        Args:
            folder, manifest: the engine.
            number: which of the GPUs it is.
            join: finds the ranks that add up with it; None: it is alone.

        Raises:
            EngineError: the engine is for another GPU or other versions, or its kernels are missing.
            EnvironmentFault: TensorRT, a GPU or the CUDA bindings are missing, or the driver is too old for them or
                for the engine's kernels.
        """
        self.flavour: Flavour = "tensorrt-rtx" if manifest.target.backend == "tensorrt-rtx" else "tensorrt"
        try:
            from cuda.bindings import runtime as cudart  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError:
            raise EnvironmentFault(f"cuda-bindings is not installed; {install('gpu')}") from None
        self._cuda: Any = cudart
        self._is_silent = False
        self._graphs: dict[int, Any] = {}
        self._next_graph = 1
        self._plans: list[TrtPlan] = []
        self.scratch = (0, 0)
        self._pinned: list[int] = []
        sm = self._open_gpu(number)
        self.group: Group | None = None
        check_loadable(folder, manifest, sm=sm, versions=installed_versions(manifest.runtime_versions))
        check_driver(folder, manifest, sm=sm, driver=self._version("cudaDriverGetVersion"))
        if join is not None:  # before TensorRT, which then finds the library of NCCL that is there
            self.group = join(lambda: self._started(cudart.cudaSetDevice, number))
        self.trt = load(self.flavour)
        self.log = library_log(self.trt)
        source = KernelFolder(folder, sm, CudaDriver()) if manifest.plugins else None
        self.registration = register(self.trt, source)
        self.stream = int(self._call(cudart.cudaStreamCreateWithFlags, _NON_BLOCKING))

    def _open_gpu(self, number: int) -> int:
        """Make a GPU's context current and return its compute capability, 89 for an L40S.

        Raises:
            EnvironmentFault: CUDA does not start, by the error that it gave, or there are fewer GPUs.
        """
        count = int(self._started(self._cuda.cudaGetDeviceCount))
        if not count:
            self._refuse_start(self._cuda.cudaError_t(_NO_DEVICE))
        if number >= count:
            raise EnvironmentFault(
                f"rank {number} needs a GPU of its own, and there are {count}; run where each has one"
            )
        self._started(self._cuda.cudaSetDevice, number)
        self._started(self._cuda.cudaFree, 0)  # the first call that needs a context makes it
        attribute = self._cuda.cudaDeviceAttr
        major = self._started(self._cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMajor, number)
        minor = self._started(self._cuda.cudaDeviceGetAttribute, attribute.cudaDevAttrComputeCapabilityMinor, number)
        return 10 * int(major) + int(minor)

    def _started(self, function: Any, *arguments: Any) -> Any:
        """Make one of the first calls."""
        try:
            error, *values = function(*arguments)
        except RuntimeError as fault:  # the bindings find no library, or no such function in an old one
            raise EnvironmentFault(f"CUDA does not start ({fault}); install a driver that fits cuda-bindings") from None
        if int(error):
            self._refuse_start(error)
        return values[0] if values else None

    def _refuse_start(self, error: Any) -> NoReturn:
        name, text = (_text(ask(error)[1]) for ask in (self._cuda.cudaGetErrorName, self._cuda.cudaGetErrorString))
        versions = {"driver": self._version("cudaDriverGetVersion"), "runtime": self._version("cudaRuntimeGetVersion")}
        raise EnvironmentFault(startup_fault(int(error), name, text, **versions))

    def _version(self, ask: str) -> int:
        """Return a version of CUDA, 13000 for 13.0; 0 where there is none."""
        error, *values = getattr(self._cuda, ask)()
        return 0 if int(error) else int(values[0])

    def mark(self) -> tuple[int, int]:
        """Return what `faults` and `reason` take for now."""
        return len(self.registration.failures), self.log.count

    def faults(self, since: tuple[int, int]) -> list[str]:
        """Return what plugins, and after them the library, said was wrong since a mark."""
        return [*self.registration.failures[since[0] :], *self.log.since(since[1])]

    def reason(self, since: tuple[int, int], default: str) -> str:
        """Return the first fault since a mark: the plugin's, which the library only knows to have failed."""
        return next(iter(self.faults(since)), default)

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
        try:
            await_stream(self._is_done, self.group)
        except SilentGpuError:
            self._is_silent = True
            raise

    def _is_done(self) -> bool:
        """Ask whether everything that was started is done."""
        error, *_ = self._cuda.cudaStreamQuery(self.stream)
        if int(error) == _NOT_READY:
            return False
        self._check(error)
        return True

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
        self.log.quiet = True
        try:
            work()
        except BaseException:
            error, graph = self._ended()  # what went wrong in it is raised, not this
            if not error and graph:
                self._cuda.cudaGraphDestroy(graph)
            self._cuda.cudaGetLastError()  # such errors are not sticky, but remembered
            raise
        finally:
            self.log.quiet = False
        error, graph = self._ended()
        self._checked_capture(error)
        try:
            error, *made = self._cuda.cudaGraphInstantiate(graph, 0)
            self._checked_capture(error)
        finally:
            self._call(self._cuda.cudaGraphDestroy, graph)
        (recorded,) = made
        number, self._next_graph = self._next_graph, self._next_graph + 1
        self._graphs[number] = recorded
        return number

    def _ended(self) -> tuple[Any, Any]:
        error, *graph = self._cuda.cudaStreamEndCapture(self.stream)
        return error, graph[0] if graph else None

    def _checked_capture(self, error: Any) -> None:
        """Raise what a capture failed with; the next call must not find the error again."""
        if int(error):
            self._cuda.cudaGetLastError()
            if int(error) == _OUT_OF_MEMORY:
                raise MemoryError("no GPU memory is free for a CUDA graph")
        self._check(error)

    def launch(self, graph: int) -> None:
        """Start a recorded graph."""
        self._call(self._cuda.cudaGraphLaunch, self._graphs[graph], self.stream)

    def forget(self, graph: int) -> None:
        """Give back a recorded graph."""
        self._call(self._cuda.cudaGraphExecDestroy, self._graphs.pop(graph))

    def close(self) -> None:
        """Give back plans, graphs, page-locked memory and the stream. A GPU that stands still gives nothing back."""
        if self._is_silent:
            return
        self.synchronize()
        for graph in list(self._graphs):
            self.forget(graph)
        for plan in self._plans:
            plan.close()
        self._plans.clear()
        if self.group is not None:  # no context has it any more
            self.group.close()
            self.group = None
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
            raise EngineError(f"CUDA: {_text(self._cuda.cudaGetErrorString(error)[1])}; the GPU step failed")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
