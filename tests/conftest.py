"""Fixtures that more than one part of the tests needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.exporter.checkpoint.new import new_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the preset `tiny` (seed 0). Shared: read it, never write to it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    new_checkpoint(folder, "tiny")
    return folder
