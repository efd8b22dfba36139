"""What quantizing costs is measured on one matrix of each kind, also where no value is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.presets import load_preset, stored_as
from seekforge.exporter.checkpoint.quantization_error import quantization_errors
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.formats.checkpoint.safetensors import Checkpoint


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors whose values are looked at."""
    names: list[str] = []
    read_rows = Checkpoint.read_rows

    def noted(self: Checkpoint, name: str, start: int, out: np.ndarray) -> None:
        assert len(out) <= 256
        names.append(name)
        read_rows(self, name, start, out)

    monkeypatch.setattr(Checkpoint, "read_rows", noted)
    return names


def test_a_checkpoint_of_holes_has_no_errors_and_is_not_read_through(tmp_path: Path, read: list[str]) -> None:
    """Headers from the hub are such a one: of GLM-5 it would be 60,000 matrices."""
    new_sparse_checkpoint(tmp_path / "holes", stored_as(load_preset("glm5-tiny"), "bf16"))
    with open_checkpoint(tmp_path / "holes") as opened:
        read.clear()
        assert quantization_errors(opened.checkpoint, opened.config) == {}
    kinds = {name.split(".", 3)[-1] for name in read if ".experts." not in name}
    assert read and len([name for name in read if ".experts." in name]) == 3 and len(kinds) == len(read) - 3


def test_each_kind_loses_what_three_bits_of_mantissa_do(tmp_path: Path, read: list[str]) -> None:
    new_checkpoint(tmp_path / "values", stored_as(load_preset("tiny"), "bf16"))
    with open_checkpoint(tmp_path / "values") as opened:
        read.clear()
        errors = quantization_errors(opened.checkpoint, opened.config)
    assert {"self_attn.q_a_proj", "mlp.gate_proj", "mlp.experts.gate_proj"} <= errors.keys()
    assert len(errors) == len(read) and all(0.01 < error < 0.05 for error in errors.values())


def test_what_is_not_quantized_has_no_errors(tiny_source: Checkpoint) -> None:
    assert quantization_errors(tiny_source, load_preset("tiny").config) == {}
