"""Which nvcc is used, how it is called, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.pretended_toolkit import called, write_nvcc

from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.plugins.kernels.providers import nvcc


def compiled(folder: Path, found: nvcc.Nvcc) -> bytes:
    source = folder / "source.cu"
    return nvcc.compile_source(
        found, source, entry="kernel", macros={"SEEKFORGE_E": 16}, include=[folder / "a", folder / "b"], sm=90
    )


def test_the_environment_comes_before_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tmp_path / "one", version="13.1.5")
    write_nvcc(tmp_path / "two", version="12.9.86")
    monkeypatch.setenv("PATH", str(tmp_path / "two" / "bin"))
    assert nvcc.find("flashinfer") == nvcc.Nvcc(tmp_path / "two" / "bin" / "nvcc", "12.9.86")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "one"))
    assert nvcc.find("flashinfer").version == "13.1.5"


@pytest.mark.parametrize("place", ["nvidia/cu13/bin/nvcc", "nvidia/cuda_nvcc/bin/nvcc"])
def test_nvidias_packages_will_do(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc((tmp_path / place).parents[1])
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvcc.find("flashinfer").path == tmp_path / place


@pytest.mark.parametrize(
    ("home", "version", "words"),
    [
        ("", "", r"nvcc is not found in CUDA_HOME, PATH.*provider flashinfer.*pip install 'nvidia-cuda-nvcc"),
        ("elsewhere", "13.0.88", "CUDA_HOME is .*, which has no bin/nvcc"),
        ("cuda", "12.4.131", "is nvcc 12.4.131, needs 12.9 or later; pip install 'nvidia-cuda-nvcc"),
        ("cuda", "none", "tells no version"),
    ],
)
def test_a_compiler_that_will_not_do_is_refused_in_one_line(
    home: str, version: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setenv("PATH", str(tmp_path))
    if home:
        write_nvcc(tmp_path / "cuda", version=version)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / home))
    with pytest.raises(EnvironmentFault, match=words) as caught:
        nvcc.find("flashinfer")
    assert "\n" not in str(caught.value)


def test_one_kernel_is_compiled_in_a_temporary_place(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "--use_fast_math")
    assert compiled(tmp_path, nvcc.find("flashinfer")) == b"cubin"
    arguments, flags, folder = called(toolkit)
    assert {"-cubin", "-arch=sm_90", "-DSEEKFORGE_E=16", "-Xptxas=--entry,kernel"} <= set(arguments)
    assert [one for one in arguments if one.startswith("-I")] == [f"-I{tmp_path / name}" for name in "ab"]
    assert flags == [] and not folder.exists(), "flags that no digest knows of, and what was left behind"


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("x.cuh(3): error: expected a thing", ""),
        (
            "nvcc fatal   : Failed to preprocess host compiler properties.",
            "; it needs a host C++ compiler, such as g++, ",
        ),
    ],
)
def test_the_first_error_is_the_message(
    message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvcc(tmp_path / "cuda", message=message)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(TargetError) as caught:
        compiled(tmp_path, nvcc.find("flashinfer"))
    assert str(caught.value) == f"nvcc 13.0.88 ended with 2: {message}" + (f"{hint}in PATH" if hint else "")
