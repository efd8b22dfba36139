"""FP8 weights that are dequantized once give what those give that every product dequantizes."""

from __future__ import annotations

import pytest
import torch

from seekforge.exporter.models.shared import weights
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import FP8


def dtypes(session: TorchSession) -> set[torch.dtype]:
    return {parameter.dtype for parameter in session.module().parameters()}


def test_wide_weights_change_no_bit_and_are_made_where_they_fit(
    tiny_config: ModelConfig, tiny_source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense layer and one with experts."""

    def run() -> tuple[TorchSession, dict[str, torch.Tensor]]:
        session = TorchSession(Settings(tiny_config, FP8, "f32"), tiny_source, layer_range=(0, 2))
        results = session.prefill(list(range(20, 90)))
        return session, results | session.caches

    wide, results = run()
    num_bytes = sum(parameter.nbytes for parameter in wide.module().parameters())
    assert torch.float8_e4m3fn not in dtypes(wide) and num_bytes > 2**24
    monkeypatch.setattr(weights, "WIDE_BYTES", 2**24)
    narrow, expected = run()
    assert torch.float8_e4m3fn in dtypes(narrow)
    assert results.keys() == expected.keys() and len(results) > 6
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
