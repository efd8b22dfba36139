"""What the compiler is told beside the graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from seekforge.exporter.builder.tensorrt import worker
from seekforge.formats.weight_recipes import hadamard
from seekforge.plugins.tensorrt import library


def request_for(flavour: str) -> dict[str, Any]:
    return {"flavour": flavour, "sms": [89], "profiles": []}


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_products_of_f32_are_not_rounded_to_tf32(flavour: str) -> None:
    """It is on unless it is cleared, in either library."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    library.load("tensorrt-rtx")
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32), "the library's default"
    builder = SimpleNamespace(create_builder_config=lambda: config)
    made = worker._config(trt, builder, None, request_for(flavour), None)
    assert made is config and not made.get_flag(trt.BuilderFlag.TF32)


def test_what_tf32_would_do_to_the_hadamard_table() -> None:
    """The reason: ten bits of mantissa move every entry by more than bf16 results forgive in a sum of 128."""
    table = hadamard(128)
    rounded = ((table.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    assert np.abs(rounded / table - 1).min() > 1e-4
