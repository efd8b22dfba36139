"""What tests of GPU builds share."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.exporter.builder.tensorrt.check import Inputs, open_inputs


@pytest.fixture(scope="module")
def inputs(tiny_programs: dict[str, Path], tiny_checkpoint: Path) -> Inputs:
    """The tiny program and its checkpoint."""
    return open_inputs(tiny_programs["fp8"], tiny_checkpoint)
