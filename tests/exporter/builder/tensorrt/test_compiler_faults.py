"""Failures of the compiler that have a remedy: another GPU than the target's, and too little workspace."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from seekforge.common.errors import EngineError, EnvironmentFault
from seekforge.exporter.builder.cli import build as build_command
from seekforge.exporter.builder.tensorrt import compiler, worker
from seekforge.exporter.builder.tensorrt.diagnostics import too_tight

_SKIPPED = "[WARNING] layers.3.self_attn.qkv_a_proj/BlockFp8Linear: Skip format combination, exceeding workspace limit"
_REFUSED = "[localCheckMacros.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size was 536870912 bytes.)"
_LAYER_3 = "layer 3, the joint projection to query and key latents (operator BlockFp8Linear)"


# --- the GPU ------------------------------------------------------------------------------------------------


def driver(sm: int, fault: int = 0) -> SimpleNamespace:
    """Stands in for the bindings of the driver on a machine with one GPU."""
    kind = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=sm // 10, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=sm % 10
    )
    return SimpleNamespace(
        cuInit=lambda flags: (fault,), CUdevice_attribute=kind, cuDeviceGetAttribute=lambda what, device: (0, what)
    )


def compile_with(monkeypatch: pytest.MonkeyPatch, bindings: Callable[[], object], **request: Any) -> None:
    """Run the worker up to the library, which is a stand-in that raises LookupError."""

    def found(name: str) -> object:
        assert name == "cuda.bindings.driver"
        return bindings()

    def reached(*arguments: object) -> None:
        raise LookupError("the library was asked")

    trt = SimpleNamespace(ILogger=object)
    monkeypatch.setattr(worker, "load", lambda flavour: trt)
    monkeypatch.setattr(worker, "_logger", reached)
    monkeypatch.setattr(worker, "importlib", SimpleNamespace(import_module=found))
    worker.compile_request(request, None)  # pyright: ignore[reportArgumentType] - nothing is reported


@pytest.mark.parametrize(
    ("sm", "target", "sms", "message"),
    [
        (
            80,
            "h200",
            [90],
            r"^this GPU is sm80, target h200 needs sm90; build where such a GPU is, or for a target of this one",
        ),
        (120, "", [121], "^this GPU is sm120, the plan needs sm121; "),
    ],
)
def test_a_plan_for_another_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, sm: int, target: str, sms: list[int], message: str
) -> None:
    """TensorRT would compile for the GPU that is here, and the manifest would name another."""
    with pytest.raises(EnvironmentFault, match=message):
        compile_with(monkeypatch, lambda: driver(sm), flavour="tensorrt", target=target, sms=sms)


def absent() -> object:
    raise ImportError("cuda.bindings")


def without_driver() -> object:
    raise RuntimeError("libcuda.so.1 is not found")


@pytest.mark.parametrize(
    ("flavour", "bindings"),
    [
        ("tensorrt", lambda: driver(90)),
        ("tensorrt", lambda: driver(80, fault=100)),
        ("tensorrt", absent),
        ("tensorrt", without_driver),
        ("tensorrt-rtx", lambda: driver(80)),
    ],
    ids=["the right one", "no GPU answers", "no bindings", "no driver", "RTX compiles for any"],
)
def test_what_is_not_known_to_be_wrong_is_left_to_the_library(
    monkeypatch: pytest.MonkeyPatch, flavour: str, bindings: Callable[[], object]
) -> None:
    with pytest.raises(LookupError, match="the library was asked"):
        compile_with(monkeypatch, bindings, flavour=flavour, target="h200", sms=[90])


def test_the_gpu_here_is_what_the_driver_says() -> None:
    """On any machine: a number, or None where there is no GPU."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    assert importlib.import_module("seekforge.exporter.builder.tensorrt.worker").present_sm() in (
        None,
        80,
        86,
        89,
        90,
        100,
        120,
    )


def test_when_tensorrt_does_not_start_the_driver_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(
        cuInit=lambda flags: (803,),
        cuGetErrorName=lambda error: (0, b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
        cuGetErrorString=lambda error: (0, b"system has unsupported display driver / cuda driver combination"),
        cuDriverGetVersion=lambda: (0, 12080),
    )

    def refuse(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt = SimpleNamespace(Builder=refuse)
    monkeypatch.setattr(worker, "importlib", SimpleNamespace(import_module=lambda name: broken))
    with pytest.raises(EnvironmentFault, match=r"MISMATCH, 803: .*CUDA 12\.8\): .*different versions.*a GPU of sm90$"):
        worker._builder(trt, SimpleNamespace(errors=[]), {"flavour": "tensorrt", "sms": [90]})
    broken.cuInit = lambda flags: (0,)
    with pytest.raises(EnvironmentFault, match=r"nullptr\); build on a machine with a GPU of sm90$"):
        worker._builder(trt, SimpleNamespace(errors=[]), {"flavour": "tensorrt", "sms": [90]})


# --- the workspace ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "workspace", "alike", "expected"),
    [
        ([_REFUSED], 512 << 20, 0, "--workspace 512M is too small: pass more, or leave it out"),
        (["[INFO] x", _SKIPPED], 1024, 0, f"--workspace 1K is too small for {_LAYER_3}: pass more, or leave it out"),
        ([_SKIPPED], 1000, 56, "--workspace 1000 is too small for layer 3 (and 56 layers like it), the joint "),
        (["no implementation for node X due to insufficient workspace."], 3 << 30, 0, "--workspace 3G is too small: "),
        ([_REFUSED], (512 << 20) - 1, 0, None),
        (["layers.3/Mul: bad"], 1024, 0, None),
        ([], 1024, 0, None),
    ],
)
def test_too_little_workspace_is_told_from_other_faults(
    lines: list[str], workspace: int, alike: int, expected: str | None
) -> None:
    said = too_tight(lines, workspace, alike)
    assert said is None if expected is None else said is not None and said.startswith(expected)


@pytest.mark.parametrize("workspace", [None, 1024])
def test_a_crash_is_explained_by_what_this_plan_left_in_the_log(tmp_path: Path, workspace: int | None) -> None:
    """Not by what stood in the file before."""
    log = tmp_path / "log"

    def crash(words: str) -> str:
        script = f"import os, sys; sys.stderr.write({words!r}); sys.stderr.flush(); os.abort()"
        with pytest.raises(EngineError) as caught:
            compiler._run([sys.executable, "-c", script], log, lambda done: None, workspace_bytes=workspace, alike=2)
        return str(caught.value)

    log.write_text(_SKIPPED + "\n")
    said = crash("[INFO] nothing of use\n")
    assert said.startswith("the compiler crashed (signal 6)")
    assert ("with --workspace 1K, which may be too small" in said) == (workspace is not None)
    said = crash(_SKIPPED + "\n")
    if workspace is None:
        assert said.startswith("the compiler crashed (signal 6)")
    else:
        assert said.startswith("--workspace 1K is too small for layer 3 (and 2 layers like it), ")
    assert said.endswith(f"{log})" if workspace else f"{log}")


def run_build(program: Path, out: Path, workspace: str) -> BaseException | None:
    arguments = [str(program), str(out), "--target", "rtx4090", "--no-kernels", "--quiet", "--workspace", workspace]
    return CliRunner().invoke(build_command, arguments).exception


@pytest.mark.slow
def test_a_real_build_with_too_little_workspace_says_so(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    """TensorRT-RTX ends its process, and says nothing of a limit."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    fault = run_build(tiny_programs["fp8"], tmp_path / "engine", "1K")
    assert isinstance(fault, EngineError)
    said = "with --workspace 1K, which may be too small: pass more, or leave it out; its last words are in "
    assert str(fault).startswith("the compiler crashed (signal 6) in stage 'compile', ") and said in str(fault)
    assert Path(str(fault).rpartition(said)[2]).is_file()


@pytest.mark.slow
def test_the_example_of_the_help_works(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    option = next(one for one in build_command.params if one.name == "workspace")
    match = re.search(r"such as (\d+[KMG])", getattr(option, "help", ""))
    assert match
    assert run_build(tiny_programs["fp8"], tmp_path / "engine", match[1]) is None
