"""The device calls of `tensorrt/cuda.py`, made on stand-ins that refuse what the real libraries do not have."""

from __future__ import annotations

import ctypes
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.formats.engine.manifest import Manifest, load_manifest
from seekforge.runtime.backends.tensorrt import cuda, waiting
from seekforge.runtime.backends.tensorrt.cuda import CudaDevice
from seekforge.runtime.backends.tensorrt.device import Call

real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
trt_real = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


class FakeCuda:
    """`cuda.bindings.runtime` over host memory. Every name that it is asked for must exist in the real module."""

    def __init__(self, *, sm: int = 89, gpus: int = 1, driver: int = 13000) -> None:
        self.sm, self.gpus, self.driver = sm, gpus, driver
        self.start_error: Any = None  # of the first call
        self.calls: Counter[str] = Counter()
        self.memory: dict[int, Any] = {}
        self.free_bytes = 1 << 30
        self.capturing = False

    def __getattr__(self, name: str) -> Any:
        genuine = getattr(real, name)  # raises where CUDA has no such thing
        if not name.startswith("cuda") or isinstance(genuine, type):
            return genuine

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            result = getattr(self, f"do_{name}", lambda *_: ())(*arguments)
            return result if isinstance(result, tuple) and result and hasattr(result[0], "name") else (self.ok, *result)

        return call

    @property
    def ok(self) -> Any:
        return real.cudaError_t.cudaSuccess

    def do_cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (self.gpus,) if self.start_error is None else (self.start_error, None)

    def do_cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return (self.driver,)

    def do_cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return (13050,)

    def do_cudaGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return (error.name.encode(),)

    def do_cudaDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, ...]:
        return (self.sm // 10 if "Major" in attribute.name else self.sm % 10,)

    def do_cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self.free_bytes:
            return (real.cudaError_t.cudaErrorMemoryAllocation, None)
        block = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(block)] = block
        return (ctypes.addressof(block),)

    def do_cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self.do_cudaMalloc(size)

    def do_cudaFree(self, address: int) -> tuple[Any, ...]:
        if address:
            del self.memory[address]
        return ()

    do_cudaFreeHost = do_cudaFree

    def do_cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any, ...]:
        assert kind in (real.cudaMemcpyKind.cudaMemcpyHostToDevice, real.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        ctypes.memmove(to, source, size)
        return ()

    def do_cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        ctypes.memset(address, value, size)
        return ()

    def do_cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return (77,)

    def do_cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        self.capturing = True
        return ()

    def do_cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        self.capturing = False
        return (object(),)

    def do_cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        return (object(),)

    def do_cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return (b"a made-up fault",)


def fake_trt() -> Any:
    """TensorRT-RTX whose objects have the methods of the real ones, and no others."""
    trt = types.SimpleNamespace(__name__="tensorrt_rtx", __version__=trt_real.__version__)
    trt.ILogger = trt_real.ILogger
    trt.ExecutionContextAllocationStrategy = trt_real.ExecutionContextAllocationStrategy
    trt.DynamicShapesKernelSpecializationStrategy = trt_real.DynamicShapesKernelSpecializationStrategy
    trt.CudaGraphStrategy, trt.TensorIOMode = trt_real.CudaGraphStrategy, trt_real.TensorIOMode
    trt.contexts, trt.kernels = [], []
    engine = mock.create_autospec(trt_real.ICudaEngine, instance=True)
    engine.num_optimization_profiles, engine.num_io_tensors = 2, 1
    engine.get_tensor_name.return_value = "input_ids"
    engine.get_tensor_mode.return_value = trt_real.TensorIOMode.INPUT
    engine.get_device_memory_size_for_profile_v2.side_effect = [512, 2048]
    config = mock.create_autospec(trt_real.IRuntimeConfig, instance=True)
    cache = mock.create_autospec(trt_real.IRuntimeCache, instance=True)
    cache.serialize.return_value = b"compiled"
    config.create_runtime_cache.return_value = cache
    config.set_runtime_cache.return_value = cache.deserialize.return_value = True
    engine.create_runtime_config.return_value = config

    def context(*arguments: Any) -> Any:
        made = mock.create_autospec(trt_real.IExecutionContext, instance=True)
        trt.kernels.append((config.dynamic_shapes_kernel_specialization_strategy, config.cuda_graph_strategy))
        made.set_input_shape.side_effect = lambda name, shape: 0 not in shape
        made.execute_async_v3.return_value = made.set_tensor_address.return_value = True
        made.set_optimization_profile_async.return_value = made.is_stream_capturable.return_value = True
        made.set_device_memory.return_value = None  # so it is in the real one: only the log tells
        trt.contexts.append(made)
        return made

    engine.create_execution_context.side_effect = context
    trt.engine, trt.cache, trt.config = engine, cache, config
    runtime = mock.create_autospec(trt_real.Runtime, instance=True)
    runtime.deserialize_cuda_engine.return_value = engine

    def make_runtime(log: Any) -> Any:
        trt.log = log
        return runtime

    trt.Runtime, trt.runtime = make_runtime, runtime
    return trt


@pytest.fixture
def manifest(toy_engine: Path) -> Manifest:
    found = load_manifest(toy_engine)
    target = found.target.model_copy(update={"backend": "tensorrt-rtx", "sm": 89, "sms": (89,)})
    return found.model_copy(update={"target": target, "runtime_versions": {}})


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeCuda, Any]:
    fake, trt = FakeCuda(), fake_trt()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setattr("cuda.bindings.runtime", fake, raising=False)
    monkeypatch.setattr(cuda, "load", lambda flavour: trt)
    monkeypatch.setattr(cuda, "register", lambda trt, source: types.SimpleNamespace(failures=[], source=source))
    return fake, trt


def test_memory_goes_there_and_back(libraries, manifest: Manifest, tmp_path: Path) -> None:
    fake, _ = libraries
    device = CudaDevice(tmp_path, manifest)
    there = device.allocate(64)
    device.zero(there, 64)
    given = np.arange(12, dtype=np.int32)
    device.upload(there, given)
    back = np.empty(16, np.int32)
    device.download(back, there)
    assert list(back) == [*range(12), 0, 0, 0, 0]
    staged = device.staging(8)
    staged[:] = 7
    device.upload_staged(there, staged)
    device.synchronize()
    device.download(back, there)
    assert back.view(np.uint8)[:9].tolist() == [7] * 8 + [2]
    with pytest.raises(MemoryError, match="2,147,483,648 bytes of GPU memory are not free"):
        device.allocate(1 << 31)
    assert fake.calls["cudaGetLastError"] == 1
    device.free(there)
    device.close()
    assert not fake.memory, "page-locked memory is given back too"


def test_a_plan_has_a_context_per_profile_that_share_scratch(libraries, manifest: Manifest, tmp_path: Path) -> None:
    fake, trt = libraries
    path = tmp_path / "model.plan"
    path.write_bytes(b"plan")
    (tmp_path / "model.runtime-cache").write_bytes(b"earlier")
    device = CudaDevice(tmp_path, manifest)
    plan = device.open_plan(path)
    trt.runtime.deserialize_cuda_engine.assert_called_once_with(b"plan")
    trt.cache.deserialize.assert_called_once_with(b"earlier")
    assert plan.names() == ["input_ids"]
    call = Call({"input_ids": 100}, {"input_ids": (1, 1)})
    plan.enqueue(call)
    plan.enqueue(call)
    call.profile, call.shapes["input_ids"] = 1, (1, 9)
    plan.enqueue(call)
    call.profile, call.addresses["input_ids"] = 0, 200
    plan.enqueue(call)
    first, second = trt.contexts
    assert [call.args for call in first.set_tensor_address.call_args_list] == [("input_ids", 100), ("input_ids", 200)]
    assert [call.args for call in first.set_input_shape.call_args_list] == [
        ("input_ids", (1, 1)),
        ("input_ids", (1, 9)),
    ]
    assert second.set_tensor_address.call_args.args == ("input_ids", 100)
    assert first.execute_async_v3.call_count == 3 and second.execute_async_v3.call_count == 1
    first.set_optimization_profile_async.assert_called_once_with(0, 77)
    second.set_optimization_profile_async.assert_called_once_with(1, 77)
    (scratch,) = {context.set_device_memory.call_args.args for context in trt.contexts}
    assert scratch[1] == 2048, "as much as the larger profile needs"
    call.shapes["input_ids"] = (0, 9)
    with pytest.raises(EngineError, match=r"shape \(0, 9\) of input_ids is outside what the engine was built for"):
        plan.enqueue(call)
    device.close()
    assert (tmp_path / "model.runtime-cache").read_bytes() == b"compiled"
    assert not fake.memory


def test_calls_of_one_plan_have_their_own_memory_and_all_plans_one_scratch(
    libraries, manifest: Manifest, tmp_path: Path
) -> None:
    """Layers that are alike: what a call says is told each time it differs from the last, and only then."""
    fake, trt = libraries
    for name in ("model.plan", "mtp.plan"):
        (tmp_path / name).write_bytes(b"plan")
    device = CudaDevice(tmp_path, manifest)
    plan = device.open_plan(tmp_path / "model.plan")
    calls = [Call({"input_ids": address, "weight": 7}, {"input_ids": (1, 1)}) for address in (100, 200)]
    for call in (*calls, *calls):
        plan.enqueue(call)
    (context,) = trt.contexts
    told = [call.args for call in context.set_tensor_address.call_args_list]
    assert told == [("input_ids", 100), ("weight", 7), ("input_ids", 200), ("input_ids", 100), ("input_ids", 200)]
    assert context.set_input_shape.call_count == 1 and context.execute_async_v3.call_count == 4
    small = device.scratch
    trt.engine.get_device_memory_size_for_profile_v2.side_effect = [512, 1024]
    device.open_plan(tmp_path / "mtp.plan")
    assert device.scratch == small, "it works in what is there"
    trt.engine.get_device_memory_size_for_profile_v2.side_effect = [512, 4096]
    device.open_plan(tmp_path / "mtp.plan")
    plan.enqueue(calls[0])
    assert context.set_device_memory.call_args.args == device.scratch and device.scratch[1] == 4096
    assert list(fake.memory) == [device.scratch[0]], "the smaller one is given back"
    device.close()
    assert not fake.memory


def test_graphs_are_captured_launched_and_given_back(libraries, manifest: Manifest, tmp_path: Path) -> None:
    fake, _ = libraries
    device = CudaDevice(tmp_path, manifest)
    seen = []
    graph = device.capture(lambda: seen.append(fake.capturing))
    other = device.capture(lambda: None)
    device.launch(graph)
    device.forget(graph)
    assert seen == [True] and graph != other and fake.calls["cudaGraphLaunch"] == 1

    def fails() -> None:
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        device.capture(fails)
    assert not fake.capturing, "a step that fails does not leave the stream capturing"
    device.close()
    assert fake.calls["cudaGraphExecDestroy"] == 2


def test_an_engine_for_another_gpu_is_refused_before_anything_is_loaded(
    libraries, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, _ = libraries
    fake.sm = 120
    monkeypatch.setattr(cuda, "load", lambda flavour: pytest.fail("TensorRT was loaded"))
    with pytest.raises(EngineError, match=r"target\.sm: this GPU is sm120, the engine is for sm89"):
        CudaDevice(tmp_path, manifest)


def test_a_cuda_fault_is_told_in_its_words(libraries, manifest: Manifest, tmp_path: Path) -> None:
    fake, _ = libraries
    device = CudaDevice(tmp_path, manifest)
    fake.do_cudaStreamQuery = lambda stream: (real.cudaError_t.cudaErrorIllegalAddress, None)
    with pytest.raises(EngineError, match="CUDA: a made-up fault"):
        device.synchronize()


def test_a_stream_that_never_ends_is_left_and_nothing_is_given_back(
    libraries, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that gives memory back waits for the GPU, without end."""
    fake, _ = libraries
    device = CudaDevice(tmp_path, manifest)
    answers = [real.cudaError_t.cudaErrorNotReady] * 3 + [real.cudaError_t.cudaSuccess]
    fake.do_cudaStreamQuery = lambda stream: (answers.pop(0), None)
    device.synchronize()
    assert fake.calls["cudaStreamQuery"] == 4 and not answers, "it is asked until it is done"
    fake.do_cudaStreamQuery = lambda stream: (real.cudaError_t.cudaErrorNotReady, None)
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.1)
    with pytest.raises(EngineError, match=r"^its GPU stands still, without an answer for 0 s; start the engine again$"):
        device.download(np.zeros(4, np.uint8), device.allocate(4))
    before = fake.calls.total()
    device.close()
    assert fake.calls.total() == before
    assert not fake.calls["cudaStreamSynchronize"], "nobody can leave it"


# --- contexts -------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(libraries: Any, manifest: Manifest, tmp_path: Path) -> Any:
    (tmp_path / "model.plan").write_bytes(b"plan")
    return CudaDevice(tmp_path, manifest).open_plan(tmp_path / "model.plan")


def call(context: int = 0, *, shape: tuple[int, ...] = (1, 1), specialized: bool = False) -> Call:
    return Call({"input_ids": 64}, {"input_ids": shape}, context=context, specialized=specialized)


def test_contexts_of_captured_graphs_have_compiled_kernels_and_others_none(libraries: Any, plan: Any) -> None:
    """Never LAZY, which swaps kernels in under a graph; and no graphs of TensorRT-RTX's own inside ours."""
    _, trt = libraries
    for one in (call(), call(specialized=True), call(1, specialized=True), call(1, specialized=True)):
        plan.enqueue(one)
    kinds = trt_real.DynamicShapesKernelSpecializationStrategy
    off = trt_real.CudaGraphStrategy.DISABLED
    assert trt.kernels == [(kinds.NONE, off), (kinds.EAGER, off), (kinds.EAGER, off)]


def test_a_context_keeps_its_shapes_whatever_others_are_told(libraries: Any, plan: Any) -> None:
    _, trt = libraries
    for number, rows in ((1, 1), (2, 8), (1, 1), (2, 8)):
        plan.enqueue(call(number, shape=(rows, 1), specialized=True))
    assert [one.set_input_shape.call_count for one in trt.contexts] == [1, 1]
    assert {one.set_device_memory.call_args.args for one in trt.contexts} == {plan._device.scratch}, "it is shared"


def test_released_contexts_are_gone_and_others_stay(libraries: Any, plan: Any) -> None:
    _, trt = libraries
    for number in (0, 1, 2):
        plan.enqueue(call(number, specialized=True))
    plan.release(1)
    plan.release(9)
    plan.enqueue(call(2, specialized=True))
    assert len(trt.contexts) == 3
    plan.enqueue(call(1, specialized=True))
    assert len(trt.contexts) == 4, "made anew"


def test_a_context_is_asked_whether_it_can_be_captured(libraries: Any, plan: Any) -> None:
    _, trt = libraries
    one = call(1, specialized=True)
    plan.enqueue(one)
    assert plan.is_stream_capturable(one)
    trt.contexts[0].is_stream_capturable.assert_called_once_with(77)
    trt.contexts[0].is_stream_capturable.return_value = False
    assert not plan.is_stream_capturable(one)
    del trt.contexts[0].is_stream_capturable
    assert plan.is_stream_capturable(one), "TensorRT's contexts do not say: it is tried"


def says(trt: Any, message: str) -> Any:
    """Return what writes an error to the library's log and returns nothing."""
    return lambda *arguments: trt.log.log(trt_real.ILogger.Severity.ERROR, message)


def refuse(name: str, answer: Any) -> Any:
    def prepare(trt: Any) -> None:
        context = trt.engine.create_execution_context.side_effect

        def made(*arguments: Any) -> Any:
            one = context(*arguments)
            getattr(one, name).side_effect = answer(trt)
            return one

        trt.engine.create_execution_context.side_effect = made

    return prepare


REFUSED: dict[str, tuple[Any, str]] = {
    "address": (
        refuse("set_tensor_address", lambda trt: lambda *_: False),
        "address 0x40 of input_ids was refused",
    ),
    "address, said": (refuse("set_tensor_address", lambda trt: says(trt, "not aligned")), "not aligned"),
    "memory": (refuse("set_device_memory", lambda trt: says(trt, "memory is too small")), "memory is too small"),
    "profile": (
        refuse("set_optimization_profile_async", lambda trt: lambda *_: False),
        "no optimization profile 0",
    ),
    "shape": (refuse("set_input_shape", lambda trt: lambda *_: False), r"shape \(1, 1\) of input_ids is outside"),
    "step": (refuse("execute_async_v3", lambda trt: says(trt, "bad step")), "bad step"),
    "cache": (
        lambda trt: setattr(trt.config.set_runtime_cache, "return_value", False),
        "the cache of compiled kernels was refused",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_library_refuses_is_an_error_in_its_words(libraries: Any, plan: Any, what: str) -> None:
    _, trt = libraries
    prepare, message = REFUSED[what]
    prepare(trt)
    with pytest.raises(EngineError, match=message):
        plan.enqueue(call())


def test_an_earlier_fault_is_not_told_again(libraries: Any, plan: Any) -> None:
    _, trt = libraries
    plan._device.registration.failures.append("MoeRoute: a fault of an earlier step")
    says(trt, "an earlier error")()
    refuse("execute_async_v3", lambda trt: lambda *_: False)(trt)
    with pytest.raises(EngineError, match=r"TensorRT refused a step$"):
        plan.enqueue(call())

    def fail(*arguments: object) -> bool:
        plan._device.registration.failures.append("MoeRoute: the cause")
        trt.log.log(trt_real.ILogger.Severity.ERROR, "a plugin failed")
        return False

    trt.contexts[0].execute_async_v3.side_effect = fail
    with pytest.raises(EngineError, match="MoeRoute: the cause"):
        plan.enqueue(call())


def test_no_memory_for_a_context_is_told_from_other_faults(libraries: Any, plan: Any) -> None:
    _, trt = libraries
    trt.engine.create_execution_context.side_effect = lambda *arguments: None
    with pytest.raises(MemoryError, match="no memory for an execution context"):
        plan.enqueue(call())


def test_aliases_are_those_that_the_engine_tells(libraries: Any, plan: Any) -> None:
    _, trt = libraries
    trt.engine.num_io_tensors = 3
    trt.engine.get_tensor_name.side_effect = ["cache", "cache_out", "hidden"].__getitem__
    mode = trt_real.TensorIOMode
    modes = {"cache": mode.INPUT, "cache_out": mode.OUTPUT, "hidden": mode.OUTPUT}
    trt.engine.get_tensor_mode.side_effect = modes.__getitem__
    trt.engine.get_aliased_input_tensor.side_effect = {"cache_out": "cache"}.get
    assert plan.aliases() == {"cache_out": "cache"}
    del trt.engine.get_aliased_input_tensor
    assert plan.aliases() == {}, "a library that does not tell"


# --- captures that fail ---------------------------------------------------------------------------------------


def test_a_capture_that_fails_leaves_no_graph(libraries: Any, manifest: Manifest, tmp_path: Path) -> None:
    fake, _ = libraries
    device = CudaDevice(tmp_path, manifest)
    invalid = real.cudaError_t.cudaErrorStreamCaptureInvalidated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeCuda, "do_cudaStreamEndCapture", lambda self, stream: (invalid, None))
        with pytest.raises(EngineError, match="a made-up fault"):
            device.capture(lambda: None)
    assert fake.calls["cudaGetLastError"] == 1, "the next call does not find the error"
    full = real.cudaError_t.cudaErrorMemoryAllocation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeCuda, "do_cudaGraphInstantiate", lambda self, graph, flags: (full, None))
        with pytest.raises(MemoryError, match="no GPU memory is free for a CUDA graph"):
            device.capture(lambda: None)
    assert fake.calls["cudaGraphDestroy"] == 1, "what was recorded is given back"
    device.launch(device.capture(lambda: None))
    device.close()


# --- the start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "driver", "message"),
    [
        (
            "cudaErrorInsufficientDriver",
            12040,
            r"^the NVIDIA driver is too old \(cudaErrorInsufficientDriver, 35: a m",
        ),
        (
            "cudaErrorInsufficientDriver",
            12040,
            r"of CUDA 12\.4, .* bring CUDA 13\.5, need .* 13\.0 or later \(r580\)",
        ),
        ("cudaErrorInsufficientDriver", 0, "^no NVIDIA driver is installed here"),
        ("cudaErrorNoDevice", 13000, r"cudaErrorNoDevice, 100: .*; driver of CUDA 13\.0\): the driver shows no GPU"),
        ("cudaErrorInitializationError", 13000, "InitializationError, 3: .*the driver could not be started"),
        ("cudaErrorSystemDriverMismatch", 13000, "SystemDriverMismatch, 803: .*different versions: restart"),
        ("cudaErrorCompatNotSupportedOnDevice", 12080, "804: .*cuda-compat"),
        ("cudaErrorSystemNotReady", 13000, "802: .*nvidia-fabricmanager"),
        ("cudaErrorUnknown", 13000, "cudaErrorUnknown, 999: .*nvidia_uvm"),
        ("cudaErrorDevicesUnavailable", 13000, "46: .*exclusive mode"),
        ("cudaErrorMemoryAllocation", 13000, "2: .*no memory for a CUDA context"),
        ("cudaErrorECCUncorrectable", 13000, "cudaErrorECCUncorrectable, 214: .*see 'nvidia-smi'"),
    ],
)
@pytest.mark.parametrize("call", ["cudaGetDeviceCount", "cudaSetDevice", "cudaFree", "cudaDeviceGetAttribute"])
def test_every_error_of_the_start_is_told_by_its_own_cause(
    libraries: Any, manifest: Manifest, tmp_path: Path, error: str, driver: int, message: str, call: str
) -> None:
    fake, _ = libraries
    fake.driver = driver
    setattr(fake, f"do_{call}", lambda *arguments: (getattr(real.cudaError_t, error), None))
    with pytest.raises(EnvironmentFault, match=message) as caught:
        CudaDevice(tmp_path, manifest)
    assert "\n" not in str(caught.value)


def test_a_driver_without_gpus_and_bindings_without_a_library_are_told(
    libraries: Any, manifest: Manifest, tmp_path: Path
) -> None:
    fake, _ = libraries
    fake.gpus = 0
    with pytest.raises(EnvironmentFault, match=r"cudaErrorNoDevice, 100: .*the driver shows no GPU"):
        CudaDevice(tmp_path, manifest)

    def missing() -> None:
        raise RuntimeError('Function "cudaGetDeviceCount" not found')

    fake.do_cudaGetDeviceCount = missing
    with pytest.raises(EnvironmentFault, match=r'Function "cudaGetDeviceCount" not found.*install a driver'):
        CudaDevice(tmp_path, manifest)


def test_a_driver_too_old_for_the_kernels_is_refused_before_anything_is_loaded(
    libraries: Any, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, _ = libraries
    fake.driver = 12080
    wanting = manifest.model_copy(update={"min_driver": {"89": 13000, "120": 12000}})
    CudaDevice(tmp_path, manifest.model_copy(update={"min_driver": {"89": 12000}})).close()
    monkeypatch.setattr(cuda, "load", lambda flavour: pytest.fail("TensorRT was loaded"))
    with pytest.raises(
        EnvironmentFault,
        match=r"min_driver\.89: the kernels for sm89 need a driver of CUDA 13\.0 or later \(r580\), the driver here is "
        r"of CUDA 12\.8; install a newer driver",
    ):
        CudaDevice(tmp_path, wanting)


class Group:
    """The ranks that add up with a device. `agrees`: what the others say."""

    def __init__(self) -> None:
        self.communicator, self.agrees, self.closed, self.is_aborted = object(), True, False, False

    def agree(self, fine: bool) -> bool:
        return fine and self.agrees

    def abort(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_the_device_of_a_rank_joins_its_group_and_tells_every_context(
    libraries, manifest: Manifest, tmp_path: Path
) -> None:
    fake, trt = libraries
    fake.gpus = 4
    (tmp_path / "model.plan").write_bytes(b"plan")
    chosen: list[int] = []
    fake.do_cudaSetDevice = lambda number: chosen.append(number) or ()
    group = Group()

    def join(make_current: Callable[[], None]) -> Group:
        make_current()
        assert chosen == [3, 3], "the GPU is the current one, also of the thread that asks NCCL"
        return group

    device = CudaDevice(tmp_path, manifest, number=3, join=join)
    plan = device.open_plan(tmp_path / "model.plan")
    plan.enqueue(Call({}, {}, 0))
    trt.contexts[0].set_communicator.assert_called_once_with(group.communicator)
    group.agrees = False
    with pytest.raises(MemoryError, match="no memory for an execution context"):
        plan.enqueue(Call({}, {}, 1))
    trt.contexts[1].set_communicator.assert_not_called()
    group.agrees, make = True, trt.engine.create_execution_context.side_effect

    def refusing(*arguments: Any) -> Any:
        made = make(*arguments)
        made.set_communicator.return_value = False
        return made

    trt.engine.create_execution_context.side_effect = refusing
    with pytest.raises(EngineError, match="the communicator was refused"):
        plan.enqueue(Call({}, {}, 1, context=1))
    device.close()
    assert group.closed and device.group is None


def test_a_rank_without_a_gpu_of_its_own_is_refused(libraries, manifest: Manifest, tmp_path: Path) -> None:
    libraries[0].gpus = 2
    with pytest.raises(EnvironmentFault, match="rank 2 needs a GPU of its own, and there are 2"):
        CudaDevice(tmp_path, manifest, number=2)
