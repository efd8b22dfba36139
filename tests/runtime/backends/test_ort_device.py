"""Where ONNX Runtime runs an engine: the choice of a provider, what is refused, and values that lie on a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tests.runtime.backends.test_onnxruntime import step

from seekforge.common.errors import EnvironmentFault
from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime.backends import onnxruntime as backend_module
from seekforge.runtime.backends import ort_device
from seekforge.runtime.backends.ort_device import CPU_PROVIDER, CUDA_OPTIONS, CUDA_PROVIDER, OrtDevice, device_of
from seekforge.runtime.cli.main import main
from seekforge.runtime.engine.engine_folder import Engine

#: A device of its own, but for the memory, which is the CPU's: inputs are copied into values that are bound.
PRETENDED = OrtDevice(CPU_PROVIDER, "cpu", holds_inputs=True)


@pytest.fixture
def cuda_engine(edit_manifest) -> Path:
    return edit_manifest(lambda manifest: manifest["target"].update({"name": "ort-cuda", "provider": "cuda"}))


def test_an_engine_of_the_cpu_runs_there(toy_engine: Path) -> None:
    assert device_of(load_manifest(toy_engine)).providers == [CPU_PROVIDER]


def test_cuda_comes_first_and_keeps_f32(cuda_engine: Path) -> None:
    device = device_of(load_manifest(cuda_engine), providers=[CUDA_PROVIDER, CPU_PROVIDER])
    assert device.providers == [(CUDA_PROVIDER, CUDA_OPTIONS), CPU_PROVIDER]
    assert CUDA_OPTIONS["use_tf32"] == "0" and (device.memory, device.holds_inputs) == ("cuda", True)
    device.check([CUDA_PROVIDER, CPU_PROVIDER])


def test_a_package_without_cuda_is_refused_at_start_in_one_line(cuda_engine: Path) -> None:
    done = CliRunner().invoke(main, ["run", str(cuda_engine), "--prompt", "x", "--max-tokens", "1"])
    assert done.exit_code == 2 and done.output.count("\n") <= 2
    assert f"target ort-cuda needs {CUDA_PROVIDER}, the onnxruntime" in done.output
    assert "pip install 'onnxruntime-gpu" in done.output


def test_both_packages_are_refused(cuda_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_device, "onnxruntime_conflict", lambda: "both are installed")
    with pytest.raises(EnvironmentFault, match="target ort-cuda: both are installed"):
        device_of(load_manifest(cuda_engine), providers=[CUDA_PROVIDER])


def test_a_session_that_fell_back_is_refused(toy_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = OrtDevice(CUDA_PROVIDER, "cuda", holds_inputs=True, options=CUDA_OPTIONS)
    monkeypatch.setattr(backend_module, "device_of", lambda manifest: asked)
    monkeypatch.setattr(backend_module, "add_operators", lambda options: pytest.fail("operators of the CPU on a GPU"))
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(
            EnvironmentFault, match=f"fell back from {CUDA_PROVIDER} to {CPU_PROVIDER}: there is no CUDA device"
        ),
    ):
        Engine.open(toy_engine).open_backend(threads=1)


def test_values_on_a_device_give_what_bound_arrays_give(toy_engine: Path, toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "device_of", lambda manifest: PRETENDED)
    backend = Engine.open(toy_engine).open_backend(threads=1)
    backend.allocate_caches(6)
    graph = backend._graphs["model"]  # pyright: ignore
    caches = {name: value.data_ptr() for name, value in graph.caches.items()}
    ids = [(7 * i) % 300 for i in range(70)]
    backend.run(step(ids[:67], [4, 2]), outputs=())
    first = backend.run(step(ids[67:68], [4, 2], 67), outputs={"logits"})
    held = {name: value.data_ptr() for name, value in graph._binding._on_device.items()}
    second = backend.run(step(ids[68:69], [4, 2], 68), outputs={"logits"})
    # values of a step of the same shape are written over, and the results of the step before stay
    assert held and {name: value.data_ptr() for name, value in graph._binding._on_device.items()} == held
    np.testing.assert_allclose(first.fetch("logits")[0], toy.logits(ids[:68]), atol=1e-4)
    np.testing.assert_allclose(second.fetch("logits")[0], toy.logits(ids[:69]), atol=1e-4)
    assert {name: value.data_ptr() for name, value in graph.caches.items()} == caches
    backend.close()
