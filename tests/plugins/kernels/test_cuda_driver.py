"""Which driver a cubin needs, and refusals of a driver that is too old."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.kernel_cases import fake_kernels

from seekforge.common.errors import EngineError, EnvironmentFault, TargetError
from seekforge.plugins.kernels import launcher as device
from seekforge.plugins.kernels.cuda_driver import (
    KERNELS_NEED,
    driver_branch,
    needed_driver,
    needs,
    startup_fault,
    too_old,
    version_of_branch,
    version_text,
)
from seekforge.plugins.kernels.kernel_set import from_json, to_json
from seekforge.plugins.kernels.sm_limits import SMS

#: Compile-time sizes of the router's kernels.
ROUTER = {"E": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True}


def cubin(abi: tuple[int, int], tool: str = "", machine: int = 190) -> bytes:
    """Return the head of a cubin, and the note of an assembler."""
    head = bytearray(64)
    head[:9] = bytes([0x7F, *b"ELF", 2, 1, 1, *abi])
    head[18:20] = machine.to_bytes(2, "little")
    return bytes(head) + (f"\0Cuda compilation tools, release {tool}, V{tool}.1\0".encode() if tool else b"")


@pytest.mark.parametrize(
    ("abi", "tool", "expected"),
    [
        ((51, 7), "", 12000),
        ((51, 7), "12.9", 12000),
        ((65, 8), "12.9", 12080),
        ((65, 8), "13.4", 13000),
        ((51, 7), "13.0", 13000),
        ((65, 8), "14.1", 14000),
    ],
)
def test_the_driver_follows_from_the_format_and_the_assembler(abi: tuple[int, int], tool: str, expected: int) -> None:
    assert needed_driver(cubin(abi, tool)) == expected


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (cubin((65, 9), "14.0"), "cubins of OS ABI 65 version 9 are not known here"),
        (cubin((51, 7), machine=62), "no cubin"),
        (b"//\n.version 8.8\n.target sm_90", "no cubin"),
        (b"", "no cubin"),
    ],
)
def test_what_is_no_known_cubin_is_refused(code: bytes, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        needed_driver(code)


def test_kernels_of_the_pinned_compiler_need_what_is_said_of_each_sm(tmp_path: Path) -> None:
    """Assembled as Triton does it, by its own two assemblers: a new Triton with newer ones is noticed here."""
    backend = pytest.importorskip("triton.backends.nvidia.compiler", reason="triton is not installed")
    assert set(KERNELS_NEED) == {*SMS, 86}
    for sm, expected in KERNELS_NEED.items():
        source = tmp_path / "k.ptx"
        source.write_text(f".version 8.8\n.target sm_{sm}\n.address_size 64\n.visible .entry k() {{ ret; }}\n")
        tool = backend.get_ptxas(sm)
        path = getattr(tool, "path", tool[0] if isinstance(tool, tuple) else tool)
        done = [path, f"-arch=sm_{sm}", str(source), "-o", str(tmp_path / "k.cubin")]
        subprocess.run(done, check=True, env=dict(os.environ))
        assert needed_driver((tmp_path / "k.cubin").read_bytes()) == expected, sm


def test_versions_are_told_as_people_know_them() -> None:
    assert version_text(13000) == "13.0" and version_text(12080) == "12.8"
    assert driver_branch(13000) == 580 and driver_branch(12000) == 525 and driver_branch(99000) is None
    assert needs(13000) == "a driver of CUDA 13.0 or later (r580)" and needs(99000) == "a driver of CUDA 99.0 or later"
    assert [version_of_branch(branch) for branch in (570, 571, 580, 999, 390)] == [12080, 12080, 13000, 13000, 0]


def test_a_driver_is_refused_only_when_it_is_older() -> None:
    assert too_old("kernels", 13000, 13000) is None and too_old("kernels", 12000, 13010) is None
    assert too_old("kernels", 13000, 12090) == (
        "kernels need a driver of CUDA 13.0 or later (r580), the driver here is of CUDA 12.9; install a newer driver"
    )


def test_an_insufficient_driver_is_told_from_none() -> None:
    old = startup_fault(35, "cudaErrorInsufficientDriver", "text", driver=12040, runtime=13050)
    none = startup_fault(35, "cudaErrorInsufficientDriver", "text", driver=0, runtime=13050)
    assert "too old" in old and "CUDA 12.4" in old and "r580" in old and "GPU" not in old
    assert none.startswith("no NVIDIA driver is installed here")
    newer = startup_fault(36, "cudaErrorCallRequiresNewerDriver", "text", driver=11080, runtime=12090)
    assert "too old" in newer and "CUDA 12.0 or later (r525)" in newer


def test_a_launcher_asks_the_driver_before_it_loads_a_cubin(monkeypatch: pytest.MonkeyPatch) -> None:
    version = [12080]
    success = "CUDA_SUCCESS"
    bindings = SimpleNamespace(
        cuDriverGetVersion=lambda: (success, version[0]),
        cuLaunchKernelEx=None,
        CUresult=SimpleNamespace(CUDA_SUCCESS=success),
    )
    loaded: list[bytes] = []

    def from_cubin(code: bytes) -> Any:
        loaded.append(code)
        raise LookupError("the cubin was loaded")

    core = SimpleNamespace(ObjectCode=SimpleNamespace(from_cubin=from_cubin))
    modules = {"cuda.core": core, "cuda.bindings.driver": bindings}
    monkeypatch.setattr(device, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    driver = device.CudaDriver()
    image = next(iter(fake_kernels("MoeRoute", ROUTER, 90).images.values()))
    newer = type(image)(**(vars(image) | {"driver": 13000}))
    with pytest.raises(
        EnvironmentFault, match=rf"kernels \({image.entry}\) need a driver of CUDA 13\.0 .*of CUDA 12\.8"
    ):
        driver.load(newer, b"code")
    assert not loaded
    version[0] = 13010
    with pytest.raises(LookupError, match="the cubin was loaded"):
        driver.load(newer, b"code")


@pytest.mark.parametrize("value", ["13000", None, 1.5, True])
def test_a_descriptor_with_an_odd_driver_is_damaged(value: object) -> None:
    text = to_json(fake_kernels("MoeRoute", ROUTER, 90))
    assert '"driver": 12000' in text
    odd = text.replace('"driver": 12000', f'"driver": {json.dumps(value)}')
    with pytest.raises(EngineError, match="damaged kernel descriptor"):
        from_json(odd, where="here")


@pytest.mark.parametrize(
    ("num_ctas", "programmatic", "setting"),
    [(1, False, ""), (2, False, ""), (1, True, ""), (2, True, ""), (1, True, "0"), (1, False, "1")],
)
def test_a_launch_is_described_once_in_cudas_own_words(
    num_ctas: int, programmatic: bool, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what lets it start before the launch before it has ended, where its kernel waits by itself."""
    if setting:
        monkeypatch.setenv(device.PROGRAMMATIC, setting)
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    names = ("CUresult", "CUlaunchConfig", "CUlaunchAttribute", "CUlaunchAttributeID", "CUfunction", "CUstream")
    cluster = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    early = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    read = {
        cluster: lambda value: (value.clusterDim.x, value.clusterDim.y),
        early: lambda value: value.programmaticStreamSerializationAllowed,
    }
    answers, seen = [bindings.CUresult.CUDA_SUCCESS] * 3 + [bindings.CUresult.CUDA_ERROR_LAUNCH_FAILED], []

    def launch(config: Any, function: Any, parameters: int, extra: int) -> tuple[Any]:
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        block = config.blockDimX, config.blockDimY, config.blockDimZ
        attributes = [(one.id, read[one.id](one.value)) for one in config.attrs]
        assert config.numAttrs == len(attributes)
        seen.append((int(function), parameters, int(config.hStream), grid, block, config.sharedMemBytes, attributes))
        assert extra == 0
        return (answers.pop(0),)

    driver_module = SimpleNamespace(**{name: getattr(bindings, name) for name in names}, cuLaunchKernelEx=launch)
    modules = {"cuda.core": SimpleNamespace(), "cuda.bindings.driver": driver_module}
    monkeypatch.setattr(device, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    driver = device.CudaDriver()
    image = next(iter(fake_kernels("MoeRoute", ROUTER, 90).images.values()))
    resources = replace(image.resources, shared_bytes=70_000)
    image = replace(image, num_warps=8, num_ctas=num_ctas, programmatic=programmatic, resources=resources)
    prepared = [driver.prepare(SimpleNamespace(handle=7), image, (n, 5, 6), 0x100 * n) for n in (3, 4)]
    driver.launch(prepared, 0x77)
    attributes = [(cluster, (2, 1))] if num_ctas == 2 else []
    attributes += [(early, 1)] if programmatic and setting != "0" else []
    expected = [(7, 0x100 * n, 0x77, (n * num_ctas, 5, 6), (256, 1, 1), 70_000, attributes) for n in (3, 4)]
    assert seen == expected
    with pytest.raises(EngineError, match="CUDA_ERROR_LAUNCH_FAILED"):
        driver.launch(prepared, 0x78)
    assert [one[2] for one in seen] == [0x77, 0x77, 0x78, 0x78]
