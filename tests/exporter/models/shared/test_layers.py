"""RoPE is one operator where a model is exported, and the same arithmetic where it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.onnx.ops import rotary_embedding

from seekforge.exporter.models.shared import layers


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [32, 48])
def test_rope_gives_the_bits_of_the_operator_without_calling_it(
    interleaved: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of the operator imports torch's compiler."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3 * width, generator=generator)
    cos, sin = torch.randn(2, 2, 5, 16, generator=generator).unbind()
    expected = rotary_embedding(x, cos, sin, interleaved=interleaved, num_heads=3, rotary_embedding_dim=32)

    def called(*_: Any, **__: Any) -> Any:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(layers, "rotary_embedding", called)
    rope = layers.rope_interleaved if interleaved else layers.rope_half_split
    assert torch.equal(rope(x, cos, sin, 3), expected)
