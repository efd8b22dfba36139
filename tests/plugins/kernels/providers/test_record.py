"""What is noted of a library's kernels, and that they are launched as others are: with a pretended toolkit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.pretended_toolkit import called, write_nvcc

from seekforge.common.errors import EngineError, EnvironmentFault, TargetError
from seekforge.plugins.kernels import aot, launch_plan
from seekforge.plugins.kernels.kernel_set import Image, KernelSet, read_kernels, to_json
from seekforge.plugins.kernels.launch_plan import op_kernels, statics_of, workspace_bytes
from seekforge.plugins.kernels.launcher import OpLauncher
from seekforge.plugins.kernels.providers import images

SIZES = {"E": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True}
ATTRS = {"n_group": 8, "topk_group": 4, "top_k": 8, "norm": True, "scale": 2.5}
LAYOUT = [(0, 8), (8, 8), (16, 8), (24, 8), (32, 4), (36, 4)]
ENTRY = "route_by_flashinfer"
FLASHINFER = {"MoeRoute": "flashinfer"}


class Recorder:
    """A driver that remembers kernels and grids."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[int, int, int]]] = []

    def load(self, image: Image, cubin: bytes) -> Any:
        return image.entry

    def prepare(self, kernel: Any, image: Image, grid: tuple[int, int, int], parameters: int) -> Any:
        return kernel, grid

    def launch(self, prepared: Any, stream: int) -> None:
        self.launched += prepared


@pytest.fixture
def made(
    toolkit: Path, flashinfer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., KernelSet]:
    """Compile with the pretended toolkit; what its cubin says of itself is given."""
    flashinfer()

    def make(layout: list[tuple[int, int]] = LAYOUT, used: dict[str, tuple[int, int, int]] | None = None) -> KernelSet:
        monkeypatch.setattr(images, "inspect_cubin", lambda cubin: (layout, used or {ENTRY: (32, 0, 0)}))
        monkeypatch.setattr(images, "needed_driver", lambda cubin: 13000)
        (task,) = aot.tasks({"MoeRoute": SIZES}, [90], FLASHINFER)
        return aot._compile_task(task, tmp_path / "cache")

    (tmp_path / "cache").mkdir()
    return make


def test_a_descriptor_names_who_made_its_kernels(made: Callable[..., KernelSet], toolkit: Path, tmp_path: Path) -> None:
    kernels = made()
    assert kernels.provider == "flashinfer"
    assert kernels.compiler.startswith("nvcc 13.0.88 with flashinfer-python 0.7.4 (headers ")
    (image,) = kernels.images.values()
    assert (image.entry, image.num_warps, image.driver) == (ENTRY, 4, 13000)
    assert [(one.offset, one.size) for one in image.params] == LAYOUT, "no hidden parameter"
    macros = {one for one in called(toolkit)[0] if one.startswith("-D")}
    assert {"-DSEEKFORGE_E=256", "-DSEEKFORGE_TOPK_GROUPS=4", "-DSEEKFORGE_NORM=1"} <= macros
    aot.write([kernels], tmp_path / "out", cache=tmp_path / "cache")
    (entry,) = json.loads((tmp_path / "out" / "index.json").read_text())["kernels"]
    assert read_kernels(tmp_path / "out" / entry["file"]) == kernels


def test_kernels_are_launched_with_their_own_grid_and_warps(made: Callable[..., KernelSet]) -> None:
    driver = Recorder()
    launcher = OpLauncher(made(), ATTRS, {"flashinfer": b""}, driver)
    launcher.enqueue([(9, 256), (256,)], [16, 32], [48, 64], 0, 0)
    assert driver.launched == [(ENTRY, (3, 1, 1))]
    with pytest.raises(EngineError, match="compiled for top_k 8, this call has 4"):
        OpLauncher(made(), ATTRS | {"top_k": 4}, {"flashinfer": b""}, driver)


def test_an_image_is_compiled_once(
    made: Callable[..., KernelSet], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made()
    toolkit.unlink()
    assert made() == before and not toolkit.exists(), "taken from the cache"
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    write_nvcc(toolkit.parent, version="13.1.0")
    assert made().digest != before.digest and toolkit.exists(), "another compiler compiles again"


def test_the_digest_covers_the_provider_and_the_headers(
    made: Callable[..., KernelSet], flashinfer: Callable[..., Path]
) -> None:
    statics = statics_of("MoeRoute", SIZES)
    digest = made().digest
    assert digest == aot.set_digest("MoeRoute", statics, "flashinfer")
    include = flashinfer("0.7.5")
    changed = aot.set_digest("MoeRoute", statics, "flashinfer")
    (include / "flashinfer" / "inner.cuh").write_text("// changed\n")
    assert len({digest, changed, aot.set_digest("MoeRoute", statics, "flashinfer")}) == 3


@pytest.mark.parametrize(
    ("layout", "used", "words"),
    [
        (LAYOUT[:5], {ENTRY: (32, 0, 0)}, r"parameters of \[8, 8, 8, 8, 4, 4\] bytes expected, the cubin has \[8, 8"),
        (LAYOUT, {ENTRY: (32, 0, 0), "other": (4, 0, 0)}, "has the kernels route_by_flashinfer, other, expected"),
        (LAYOUT, {ENTRY: (32, 0, 2048)}, "2048 bytes of static shared memory, which no launch plan knows of"),
    ],
)
def test_a_kernel_that_a_launch_would_not_fit_is_refused(
    layout: list[tuple[int, int]], used: dict[str, Any], words: str, made: Callable[..., KernelSet]
) -> None:
    with pytest.raises(TargetError, match=f"MoeRoute flashinfer sm90: .*{words}"):
        made(layout, used)


def test_what_nvcc_refuses_is_one_line(made: Callable[..., KernelSet], toolkit: Path) -> None:
    write_nvcc(toolkit.parent, message="a.cuh(1): error: no")
    with pytest.raises(TargetError) as caught:
        made()
    assert str(caught.value) == (
        "MoeRoute flashinfer sm90: does not compile: nvcc 13.0.88 ended with 2: a.cuh(1): error: no"
    )


def test_a_missing_library_is_said_before_any_work(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seekforge.plugins.kernels.providers.library.installed", lambda package: None)
    with pytest.raises(EnvironmentFault, match="flashinfer-python is not installed"):
        aot.tasks({"MoeRoute": SIZES}, [90], FLASHINFER)


def test_a_descriptor_of_an_unknown_provider_is_refused(made: Callable[..., KernelSet], tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(to_json(replace(made(), provider="cutlass")))
    with pytest.raises(EngineError, match="kernels of provider 'cutlass', for MoeRoute this seekforge has triton, fla"):
        read_kernels(path)


def test_scratch_is_enough_for_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, attrs = [(9, 256), (256,)], ATTRS
    assert workspace_bytes("MoeRoute", shapes, attrs, [90]) == 0
    monkeypatch.setattr(op_kernels("MoeRoute", "flashinfer"), "workspace_bytes", lambda bound, sm: 512 + sm)
    assert workspace_bytes("MoeRoute", [(10, 256), (256,)], attrs, [90, 100]) == 612
    assert workspace_bytes("MoeRoute", [(10, 1024), (1024,)], attrs | {"n_group": 64}, [90]) == 0, "it has none there"
    launch_plan._bound_workspace_bytes.cache_clear()
