"""Our GLM-5 in numerics `exact` against transformers' in FP32, from the same checkpoint; layers share an indexer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.made_once import made_once
from tests.support.oracle import load_oracle, write_dequantized
from tests.support.parity import GATE, MODES, drive, lengths_of, relative_error, tokens

import seekforge.exporter.models.shared.layers as layers
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.models.glm_moe_dsa.attention import Attention
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.sparse.attention import SparseAttention
from seekforge.exporter.models.shared.step import Step
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import EXACT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "glm5", lambda root: _write(root / "tiny")) / "tiny"


def _write(folder: Path) -> None:
    new_checkpoint(folder, "glm5-tiny")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_oracle(write_dequantized(checkpoint, tmp_path_factory.mktemp("oracle") / "fp32"))


def largest_error(checkpoint: Path, oracle: Any, context: int, mode: Any) -> float:
    """Return the largest difference of logits over the sequences of a mode, in parts of their spread."""
    config = ModelConfig.load(checkpoint)
    sequences = [tokens(n, seed=n) for n in lengths_of(mode, context)]
    worst = 0.0
    with Checkpoint.open(checkpoint) as source:
        session = TorchSession(Settings(config, EXACT), source)
        for ids, run in zip(sequences, drive(session, sequences, mode), strict=True):
            with torch.inference_mode():
                expected = oracle(torch.tensor([ids])).logits[0].numpy()
            worst = max(worst, float(relative_error(run.logits, expected).max()))
    return worst


@pytest.mark.parametrize(
    ("context", "mode"),
    [
        (10, "whole"),  # below index_topk, at it, and above
        (64, "chunked"),
        (65, "whole"),
        *(pytest.param(65, mode, marks=pytest.mark.slow) for mode in MODES if mode != "whole"),
        *(pytest.param(700, mode, marks=pytest.mark.slow) for mode in ("whole", "ragged")),
        pytest.param(200, "chunked", marks=pytest.mark.slow),
    ],
)
def test_logits_equal_transformers(checkpoint: Path, oracle: Any, context: int, mode: Any) -> None:
    error = largest_error(checkpoint, oracle, context, mode)
    assert error <= GATE, f"{mode} at {context}: {error:.2e} of the spread, gate {GATE:g}"


# --- bend it, and the comparison must notice ------------------------------------------------------------


def test_a_layer_that_chooses_at_random_instead_of_sharing_is_noticed_beyond_index_topk(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, oracle: Any
) -> None:
    """What ports do that give every layer an indexer, of which most have no weights in the checkpoint."""
    forward = SparseAttention.forward

    def with_an_indexer_of_its_own(self: SparseAttention, x: torch.Tensor, step: Step, *caches: torch.Tensor) -> Any:
        if self.indexer is None:
            step = _at_random(step, self.config.index_topk)
        return forward(self, x, step, *caches)

    monkeypatch.setattr(SparseAttention, "forward", with_an_indexer_of_its_own)
    assert largest_error(checkpoint, oracle, 64, "whole") <= GATE  # invisible while everything is selected
    assert largest_error(checkpoint, oracle, 200, "whole") > 100 * GATE


def _at_random(step: Step, topk: int) -> Step:
    """Return a step whose earlier choice is one by random scores of the visible keys."""
    length = int(step.positions.max()) + 1
    scores = torch.rand(*step.positions.shape, length, generator=torch.Generator().manual_seed(0))
    hidden = torch.arange(length) > step.positions.unsqueeze(-1)
    count = min(topk, length)
    best = scores.masked_fill(hidden, -1.0).topk(count, -1)
    chosen = torch.where(best.values < 0, length, best.indices).sort(-1).values
    chosen = torch.where(chosen == length, -1, chosen)
    padded = torch.nn.functional.pad(chosen, (0, topk - count), value=-1)
    return replace(step, topk_indices=padded.to(torch.int32))


def test_a_half_split_indexer_rope_is_noticed_beyond_index_topk(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, oracle: Any
) -> None:
    monkeypatch.setattr(Attention, "index_rope", staticmethod(layers.rope_half_split))
    assert largest_error(checkpoint, oracle, 64, "whole") <= GATE
    assert largest_error(checkpoint, oracle, 200, "whole") > 100 * GATE
