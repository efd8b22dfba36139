"""Fixtures: the toy engine, copies of it that a test may damage, and the same as a GPU's engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_gpu import FakeDevice, make_gpu_engine
from tests.support.toy_engine import Toy, make_toy, write_chat_engine, write_toy_engine

from seekforge.common.files import write_json
from seekforge.formats.engine.manifest import manifest_digest


@pytest.fixture(scope="session")
def toy() -> Toy:
    return make_toy()


@pytest.fixture(scope="session")
def toy_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder that tests only read."""
    folder = tmp_path_factory.mktemp("toy") / "engine"
    write_toy_engine(folder)
    return folder


@pytest.fixture
def toy_copy(toy_engine: Path, tmp_path: Path) -> Path:
    """An engine folder that a test may damage."""
    folder = tmp_path / "engine"
    shutil.copytree(toy_engine, folder)
    return folder


@pytest.fixture
def edit_manifest(toy_copy: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Change manifest.json of `toy_copy` and return the folder."""

    def edit(change: Callable[[dict[str, Any]], object]) -> Path:
        path = toy_copy / "manifest.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        change(raw)
        write_json(path, raw | {"digest": manifest_digest(raw)})
        return toy_copy

    return edit


@pytest.fixture(scope="module")
def gpu_engine(toy_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The toy engine as a GPU's: weights are inputs, and a checkpoint that has them."""
    return make_gpu_engine(toy_engine, tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """The GPU that engines are opened on."""
    device = FakeDevice()
    monkeypatch.setattr("seekforge.runtime.backends.tensorrt.backend._open_gpu", lambda folder, manifest: device)
    return device


@pytest.fixture(scope="session")
def chat_engine(toy_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy engine with the tokens of conversations; tests only read it."""
    folder = tmp_path_factory.mktemp("chat") / "engine"
    write_chat_engine(folder, toy_engine)
    return folder
