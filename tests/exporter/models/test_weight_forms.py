"""Checkpoints of every family in BF16, NVFP4 and other forms of FP8: the model is what transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.oracle import load_oracle
from tests.support.parity import GATE, relative_error, tokens
from tests.support.weight_forms import two_layers, write_wide

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.presets import DTYPES
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.program.export import check_numerics
from seekforge.formats.numerics import BF16, EXACT, FP8
from seekforge.formats.weight_recipes.stored import BLOCK_FORMS

#: Every family once and some forms; all others of every family are slow.
FAST = [("glm5-tiny", "bf16"), ("tiny", "nvfp4"), ("tiny-v3", "ct-nvfp4")]
ALL = [(preset, dtype) for preset in ("tiny", "tiny-v3", "glm5-tiny") for dtype in DTYPES]
PAIRS = [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL if pair not in FAST)]


@pytest.mark.parametrize(("preset", "dtype"), PAIRS)
def test_the_values_of_the_checkpoint_are_kept(preset: str, dtype: str, tmp_path: Path) -> None:
    checkpoint, ids = tmp_path / "checkpoint", tokens(90, seed=4)
    new_checkpoint(checkpoint, two_layers(preset, dtype))
    oracle = load_oracle(write_wide(checkpoint, tmp_path / "wide"))
    with torch.inference_mode():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
    with open_checkpoint(checkpoint) as opened:
        assert opened.config.keeps_weights(EXACT) and opened.config.keeps_weights(BF16)
        logits = TorchSession(Settings(opened.config, EXACT), opened.checkpoint).prefill(ids).fetch("logits")
        error = float(relative_error(logits, expected).max())
        assert error <= GATE, f"{error:.2e} of the spread, gate {GATE:g}"
        if opened.config.stored_form not in BLOCK_FORMS:
            with pytest.raises(ConfigError, match="rounded once more; pass --numerics exact or bf16"):
                check_numerics(opened.config, FP8)
            return
        check_numerics(opened.config, FP8)
        assert not opened.config.keeps_weights(FP8)
        settings = Settings(opened.config, FP8, "f32")
        rounded = TorchSession(settings, opened.checkpoint).prefill(ids).fetch("logits")
        # FP8 changes the logits, and not more than FP8 does
        assert 100 * GATE < np.sqrt(np.mean((rounded - expected) ** 2)) / expected.std() < 0.5
