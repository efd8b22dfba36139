"""What every test here may pretend, and that nothing found before is remembered."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.pretended_toolkit import write_flashinfer, write_nvcc

from seekforge.plugins.kernels.providers import library


@pytest.fixture(autouse=True)
def _nothing_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    library.find.cache_clear()
    yield
    library.find.cache_clear()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended nvcc by CUDA_HOME; returns its note."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return write_nvcc(tmp_path / "cuda")


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a pretended FlashInfer: (version, headers) -> the folder of its headers."""

    def make(version: str = "0.7.4", *, headers: bool = True) -> Path:
        site = tmp_path / f"site-{version}"
        include = write_flashinfer(site, version=version, headers=headers)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        library.find.cache_clear()
        return include

    return make
