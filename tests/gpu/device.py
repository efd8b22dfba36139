"""A GPU without torch: memory, a stream and a clock beside the driver that launches kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from seekforge.common.errors import EnvironmentFault
from seekforge.plugins.kernels.launcher import CudaDriver, Driver


class Device(Protocol):
    """Memory, a stream and a clock beside the driver that launches."""

    name: str
    sm: int
    l2_bytes: int
    driver: Driver
    stream: int

    def allocate(self, num_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def upload(self, address: int, data: Tensor) -> None: ...
    def download(self, address: int, data: Tensor) -> None: ...
    def copy(self, to: int, address: int, num_bytes: int) -> None: ...
    def free_bytes(self) -> int: ...
    def seconds(self, calls: Sequence[Callable[[], None]], repeats: int) -> float: ...


def in_turns(calls: Sequence[Callable[[], None]], repeats: int) -> list[Callable[[], None]]:
    """Return at least `repeats` calls, one after the other in turns, each as often as every other."""
    return list(calls) * math.ceil(repeats / len(calls))


class CudaDevice:
    """Device 0, over cuda-bindings."""

    def __init__(self) -> None:
        self.driver = CudaDriver()
        self._cuda: Any = self.driver._driver
        self._do("cuInit", 0)
        device = self._do("cuDeviceGet", 0)
        self._do("cuCtxSetCurrent", self._do("cuDevicePrimaryCtxRetain", device))
        attribute = self._cuda.CUdevice_attribute
        major = self._do("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._do("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.sm = 10 * major + minor
        self.l2_bytes = self._do("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, device)
        self.name = self._do("cuDeviceGetName", 100, device).partition(b"\0")[0].decode()
        self._stream = self._do("cuStreamCreate", 0)
        self.stream = int(self._stream)

    def _do(self, name: str, *args: Any) -> Any:
        try:
            result = getattr(self._cuda, name)(*args)
        except RuntimeError as error:  # no libcuda
            raise EnvironmentFault(f"no CUDA driver here ({error}); run this on a machine with a GPU") from None
        if result[0] != self._cuda.CUresult.CUDA_SUCCESS:
            raise EnvironmentFault(f"{name}: {result[0].name}")
        return result[1] if len(result) > 1 else None

    def allocate(self, num_bytes: int) -> int:
        return int(self._do("cuMemAlloc", max(num_bytes, 256)))

    def free(self, address: int) -> None:
        self._do("cuMemFree", address)

    def upload(self, address: int, data: Tensor) -> None:
        if data.numel():
            self._do("cuMemcpyHtoD", address, data.data_ptr(), data.numel() * data.element_size())

    def download(self, address: int, data: Tensor) -> None:
        self._do("cuStreamSynchronize", self._stream)
        if data.numel():
            self._do("cuMemcpyDtoH", data.data_ptr(), address, data.numel() * data.element_size())

    def copy(self, to: int, address: int, num_bytes: int) -> None:
        """Copy between buffers, on the stream."""
        self._do("cuMemcpyDtoDAsync", to, address, num_bytes, self._stream)

    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""
        return int(self._do("cuMemGetInfo"))

    def seconds(self, calls: Sequence[Callable[[], None]], repeats: int) -> float:
        """Time calls in turns, at least `repeats`, in one CUDA graph, where launches cost what they do in an engine.

        Returns the mean of one call. All have been run before, in the same order, so that what the last ones left in
        caches is there when the first one begins, as it is in the middle.
        """
        work = in_turns(calls, repeats)
        for call in calls:
            call()
        self._do("cuStreamBeginCapture", self._stream, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        for call in work:
            call()
        graph = self._do("cuGraphInstantiate", self._do("cuStreamEndCapture", self._stream), 0)
        start, end = self._do("cuEventCreate", 0), self._do("cuEventCreate", 0)
        self._do("cuGraphLaunch", graph, self._stream)
        self._do("cuEventRecord", start, self._stream)
        self._do("cuGraphLaunch", graph, self._stream)
        self._do("cuEventRecord", end, self._stream)
        self._do("cuEventSynchronize", end)
        return self._do("cuEventElapsedTime", start, end) / 1e3 / len(work)
