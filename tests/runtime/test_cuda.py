"""The device calls of `backends/cuda.py`, made on stand-ins that refuse what the real libraries do not have."""

from __future__ import annotations

import ctypes
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from seekforge.plugins.errors import EngineError, EnvironmentFault
from seekforge.plugins.formats.manifest import Manifest, load_manifest
from seekforge.runtime.backends import cuda
from seekforge.runtime.backends.cuda import CudaDevice
from seekforge.runtime.backends.device import Call

real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
trt_real = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


class FakeCuda:
    """`cuda.bindings.runtime` over host memory. Every name that it is asked for must exist in the real module."""

    def __init__(self, *, sm: int = 89, gpus: int = 1) -> None:
        self.sm, self.gpus = sm, gpus
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
        return (self.gpus,)

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
    trt.Logger = mock.create_autospec(trt_real.Logger)
    trt.Logger.ERROR = trt_real.Logger.ERROR
    trt.ExecutionContextAllocationStrategy = trt_real.ExecutionContextAllocationStrategy
    trt.contexts = []
    engine = mock.create_autospec(trt_real.ICudaEngine, instance=True)
    engine.num_optimization_profiles, engine.num_io_tensors = 2, 1
    engine.get_tensor_name.return_value = "input_ids"
    engine.get_device_memory_size_for_profile_v2.side_effect = [512, 2048]
    config = mock.create_autospec(trt_real.IRuntimeConfig, instance=True)
    cache = mock.create_autospec(trt_real.IRuntimeCache, instance=True)
    cache.serialize.return_value = b"compiled"
    config.create_runtime_cache.return_value = cache
    engine.create_runtime_config.return_value = config

    def context(*arguments: Any) -> Any:
        made = mock.create_autospec(trt_real.IExecutionContext, instance=True)
        made.set_input_shape.side_effect = lambda name, shape: 0 not in shape
        made.execute_async_v3.return_value = True
        trt.contexts.append(made)
        return made

    engine.create_execution_context.side_effect = context
    trt.engine, trt.cache, trt.config = engine, cache, config
    runtime = mock.create_autospec(trt_real.Runtime, instance=True)
    runtime.deserialize_cuda_engine.return_value = engine
    trt.Runtime = lambda logger: runtime
    trt.runtime = runtime
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
    fake.gpus = 0
    with pytest.raises(EnvironmentFault, match="no NVIDIA GPU answers here"):
        CudaDevice(tmp_path, manifest)


def test_a_cuda_fault_is_told_in_its_words(libraries, manifest: Manifest, tmp_path: Path) -> None:
    fake, _ = libraries
    device = CudaDevice(tmp_path, manifest)
    fake.do_cudaStreamSynchronize = lambda stream: (real.cudaError_t.cudaErrorIllegalAddress, None)
    with pytest.raises(EngineError, match="CUDA: a made-up fault"):
        device.synchronize()
