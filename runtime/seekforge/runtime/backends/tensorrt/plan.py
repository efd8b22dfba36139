"""A plan of TensorRT or TensorRT-RTX with its execution contexts: what they are told, and whether they took it.

Nothing of this file runs without a GPU, so it holds calls of the library only; tests drive it with one that records.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from seekforge.common.dtypes import FROM_TENSORRT, NUMPY
from seekforge.common.errors import EngineError
from seekforge.common.files import replace_file
from seekforge.runtime.backends.tensorrt.device import Bound, Call

if TYPE_CHECKING:
    from seekforge.runtime.backends.tensorrt.cuda import CudaDevice

_LOG = logging.getLogger(__name__)
#: Ending of the file beside a plan in which TensorRT-RTX keeps between starts what it compiled.
_RUNTIME_CACHE = ".runtime-cache"
#: Errors of the library that are remembered.
_REMEMBERED: Final = 32
#: Module -> its logger.
_LOGS: Final[dict[str, Any]] = {}


def library_log(trt: Any) -> Any:
    """Return the logger that a library writes to: one per process, since it takes no second one.

    Some calls return nothing, and say only there that they refused. `count` is how many errors there were.
    """
    known = _LOGS.get(trt.__name__)
    if known is not None and isinstance(known, trt.ILogger):
        return known

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.count = 0
            self.quiet = False  # while a fault has a way out
            self._errors: deque[str] = deque(maxlen=_REMEMBERED)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.count += 1
                self._errors.append(message)
                _LOG.log(logging.DEBUG if self.quiet else logging.ERROR, "%s", message)

        def since(self, count: int) -> list[str]:
            """Return the errors after the first `count`, as far as they are remembered."""
            new = self.count - count
            return list(self._errors)[-new:] if new > 0 else []

    _LOGS[trt.__name__] = Log()
    return _LOGS[trt.__name__]


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
            dtype = FROM_TENSORRT[type.name]
            value = np.empty(tuple(shape), NUMPY[dtype])
            if location == trt.TensorLocation.DEVICE:
                device.download(value, int(addr))
            else:
                ctypes.memmove(value.ctypes.data, int(addr), value.nbytes)
            seen(name, value.astype(np.float32) if dtype == "bf16" else value)
            return True

    return Listener()


class TrtPlan:
    """A deserialized engine with execution contexts, which share the device's scratch memory.

    A context runs one call after the other. TensorRT reads addresses and shapes while it enqueues, so the next call
    may have others although the last one still runs on the stream; of 57 layers that are alike, shapes are told once.
    A context is of one profile, one number (`Call.context`) and one way of choosing kernels.
    """

    def __init__(self, device: CudaDevice, path: Path) -> None:
        self._device, self._path = device, path
        since = device.mark()
        runtime = device.trt.Runtime(device.log)
        self._runtime = runtime  # must outlive the engine
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            fault = device.reason(since, f"TensorRT {device.trt.__version__} cannot load it")
            raise EngineError(f"{path}: {fault}; build the engine again here")
        self._cache = self._runtime_cache()
        profiles = range(self._engine.num_optimization_profiles)
        device.reserve_scratch(max(self._engine.get_device_memory_size_for_profile_v2(number) for number in profiles))
        self._contexts: dict[tuple[int, int, bool], _Context] = {}
        self._seen: Callable[[str, np.ndarray], None] = lambda name, value: None

    def names(self) -> list[str]:
        """Names of all inputs and outputs."""
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all inputs and outputs; −1 where a size is free or not known."""
        return {name: tuple(self._engine.get_tensor_shape(name)) for name in self.names()}

    def bounds(self) -> list[dict[str, Bound]]:
        """Shapes of each input with free sizes, by profile."""
        mode = self._device.trt.TensorIOMode.INPUT
        free = [name for name, shape in self.shapes().items() if -1 in shape]
        inputs = [name for name in free if self._engine.get_tensor_mode(name) == mode]
        profiles = []
        for number in range(self._engine.num_optimization_profiles):
            shapes = {name: self._engine.get_tensor_profile_shape(name, number) for name in inputs}
            profiles.append({name: tuple(tuple(one) for one in bound) for name, bound in shapes.items()})
        return profiles

    def aliases(self) -> dict[str, str]:
        """Return output -> input whose memory it shares, as far as the library tells."""
        ask = getattr(self._engine, "get_aliased_input_tensor", None)
        if ask is None:
            return {}
        trt, engine = self._device.trt, self._engine
        outputs = [name for name in self.names() if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        return {name: source for name in outputs if (source := ask(name))}

    def enqueue(self, call: Call) -> None:
        """Start a run."""
        one = self._context(call)
        if one.scratch != self._device.scratch:
            since = self._device.mark()
            one.context.set_device_memory(*self._device.scratch)  # returns nothing: the log has what it says
            self._require(not self._device.faults(since), since, "the scratch memory was refused")
            one.scratch = self._device.scratch
        if one.addresses != call.addresses:
            since = self._device.mark()
            for name, address in call.addresses.items():
                if one.addresses.get(name) != address and not one.context.set_tensor_address(name, address):
                    one.addresses = {}  # which of them it took is not known
                    self._require(False, since, f"the address {address:#x} of {name} was refused")
            one.addresses = dict(call.addresses)
        if one.shapes != call.shapes:
            for name, shape in call.shapes.items():
                if one.shapes.get(name) != shape and not one.context.set_input_shape(name, shape):
                    one.shapes = {}
                    raise EngineError(f"{self._path}: shape {shape} of {name} is outside what the engine was built for")
            one.shapes = dict(call.shapes)
        self._seen = call.seen
        if one.watched != call.watched:
            self._listen(one, call.watched)
        since = self._device.mark()
        self._require(one.context.execute_async_v3(self._device.stream), since, "TensorRT refused a step")

    def is_stream_capturable(self, call: Call) -> bool:
        """Return what the context says of itself; one that cannot say (TensorRT's) is tried."""
        ask = getattr(self._context(call).context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._device.stream))

    def release(self, context: int) -> None:
        """Give back the execution contexts of a number."""
        for key in [key for key in self._contexts if key[1] == context]:
            del self._contexts[key]

    def close(self) -> None:
        """Keep what TensorRT-RTX compiled, so that the next start is quick; a read-only folder stays as it is."""
        if self._cache is not None:
            stored = self._path.with_suffix(_RUNTIME_CACHE)
            with contextlib.suppress(OSError):
                replace_file(stored, bytes(self._cache.serialize()))
        self._contexts.clear()

    def _context(self, call: Call) -> _Context:
        key = call.profile, call.context, call.specialized
        one = self._contexts.get(key)
        if one is None:
            one = self._contexts[key] = self._open(call.profile, specialized=call.specialized)
        return one

    def _require(self, taken: Any, since: tuple[int, int], default: str) -> None:
        """Raise what the library or a plugin said since then, unless a call was taken."""
        if not taken:
            raise EngineError(f"{self._path}: {self._device.reason(since, default)}")

    def _listen(self, one: _Context, watched: frozenset[str]) -> None:
        """Turn debug tensors of a context on and off."""
        if one.listener is None:
            listener = _listener(self._device, lambda name, value: self._seen(name, value))
            since = self._device.mark()
            self._require(one.context.set_debug_listener(listener), since, "the listener of debug tensors was refused")
            one.listener = listener
        for name in one.watched ^ watched:
            if not one.context.set_tensor_debug_state(name, name in watched):
                raise EngineError(f"{self._path}: has no debug tensor {name}; build the engine again with --taps")
        one.watched = watched

    def _open(self, profile: int, *, specialized: bool) -> _Context:
        trt, since = self._device.trt, self._device.mark()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is not None:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # never LAZY, which swaps kernels in while a captured graph holds the old ones
            kernels = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER if specialized else kernels.NONE
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # graphs are captured here, of whole steps
            self._require(config.set_runtime_cache(self._cache), since, "the cache of compiled kernels was refused")
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        group = self._device.group
        if (context is None) if group is None else not group.agree(context is not None):
            fault = self._device.reason(since, "no memory for an execution context")
            raise MemoryError(f"{self._path}: {fault}")
        if group is not None:  # waits for the other ranks, which all got here
            self._require(context.set_communicator(group.communicator), since, "the communicator was refused")
        if not context.set_optimization_profile_async(profile, self._device.stream):
            fault = self._device.reason(since, f"has no optimization profile {profile}")
            raise EngineError(f"{self._path}: {fault}; build the engine again")
        return _Context(context)

    def _runtime_cache(self) -> Any:
        """Return what TensorRT-RTX compiles for this GPU, read back from the last start; None with TensorRT."""
        if self._device.flavour != "tensorrt-rtx":
            return None
        cache = self._engine.create_runtime_config().create_runtime_cache()
        stored = self._path.with_suffix(_RUNTIME_CACHE)
        if stored.is_file() and not cache.deserialize(stored.read_bytes()):
            _LOG.info("%s: is of another driver, GPU or TensorRT-RTX; kernels are compiled anew", stored)
        return cache
