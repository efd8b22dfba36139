"""Settings for the tests of operators."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seekforge.plugins.native.library import compiled


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors here are small: more threads would mostly wait, and disturb what runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library() -> Path:
    """The compiled library of CPU operators."""
    path = compiled()
    if path is None:
        pytest.skip("the CPU operators are not compiled: python -m seekforge.plugins.native.compile")
    return path
