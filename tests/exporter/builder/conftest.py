"""What tests of builds share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import seekforge.exporter.builder.onnxruntime.build as build


@pytest.fixture
def bent_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every CPU engine that a build looks at gives logits that are 1 % too large."""

    class Bent(build.OrtSession):
        def run(self, inputs: Any, **options: Any) -> Any:
            outputs = super().run(inputs, **options)
            outputs["logits"] = outputs["logits"] * np.float32(1.01)
            return outputs

    monkeypatch.setattr(build, "OrtSession", Bent)
