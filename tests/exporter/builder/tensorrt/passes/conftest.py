"""What tests of a GPU build's passes share."""

from __future__ import annotations

import pytest
from tests.support.build_options import gpu_options

from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs, check
from seekforge.formats.targets import load_target


@pytest.fixture(scope="module")
def planned(inputs: Inputs) -> GpuBuild:
    """What a build of the tiny program for an H200 will be."""
    return check(inputs, load_target("h200"), gpu_options())
