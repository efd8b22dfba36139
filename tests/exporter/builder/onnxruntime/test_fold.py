"""The weight file: allocated before it is mapped, on systems with and without `posix_fallocate`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from seekforge.exporter.builder.onnxruntime.fold import WeightFile
from seekforge.formats.weight_recipes import Recipe, hadamard_table
from seekforge.formats.weight_recipes import hadamard as hadamard_values


def file_of(*recipes: Recipe) -> WeightFile:
    weights = WeightFile("weights.bin")
    model = onnx.ModelProto()
    weights.attach(model, {f"c{i}": recipe for i, recipe in enumerate(recipes)})
    return weights


@pytest.mark.parametrize("has_fallocate", (True, False))
def test_constants_are_written_where_the_graph_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_fallocate: bool
) -> None:
    if not has_fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    weights = file_of(hadamard_table(128), hadamard_table(1024), hadamard_table(128))
    path = weights.write(tmp_path, {}, lambda done, total: None)  # pyright: ignore[reportArgumentType] - reads no tensor
    assert path.stat().st_size == weights.num_bytes == 128 * 128 * 4 + 1024 * 1024 * 4
    stored = np.fromfile(path, np.float32)
    assert np.array_equal(stored[: 128 * 128].reshape(128, 128), hadamard_values(128))
    assert np.array_equal(stored[128 * 128 :].reshape(1024, 1024), hadamard_values(1024))
