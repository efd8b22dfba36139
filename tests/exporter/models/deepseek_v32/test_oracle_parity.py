"""Our model in numerics `exact` against transformers' DeepSeek-V3.2 in FP32, from the same checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support.oracle import (
    inject_selection,
    load_oracle,
    mtp_logits,
    record_selection,
    write_dequantized,
    write_mtp_oracle,
)
from tests.support.parity import (
    CONTEXTS,
    GATE,
    MAX_FLIPPED,
    MODES,
    Run,
    drive,
    lengths_of,
    relative_error,
    tokens,
)

import seekforge.exporter.models.shared.layers as layers
import seekforge.exporter.models.shared.sparse.attention as attention
import seekforge.plugins.moe_route.reference as moe_route_reference
from seekforge.exporter.models.deepseek_v32.attention import Attention
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import EXACT
from seekforge.formats.step_io import MTP, lay_out

#: A differing key must lie this close to the k-th score, in parts of the row's score spread.
SCORE_NOISE = 1e-5


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_oracle(write_dequantized(tiny_checkpoint, tmp_path_factory.mktemp("oracle") / "fp32"))


@pytest.fixture(scope="module")
def mtp_oracle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, torch.Tensor]]:
    folder = write_mtp_oracle(tiny_checkpoint, tmp_path_factory.mktemp("mtp-oracle"))
    return load_oracle(folder), load_file(folder / "combine.st")


@pytest.fixture(scope="module")
def session(tiny_config: ModelConfig, tiny_source: Checkpoint) -> TorchSession:
    """Our model, as it is."""
    return TorchSession(Settings(tiny_config, EXACT), tiny_source)


def compare_with_oracle(
    config: ModelConfig,
    source: Checkpoint,
    oracle: Any,
    context: int,
    mode: str,
    session: TorchSession | None = None,
) -> None:
    """Assert that every sequence of a mode gives the oracle's logits (spec §11.2 for rows at a boundary)."""
    sequences = [tokens(n, seed=n) for n in lengths_of(mode, context)]
    session = session or TorchSession(Settings(config, EXACT), source)
    for ids, run in zip(sequences, drive(session, sequences, mode), strict=True):
        with torch.inference_mode(), record_selection(oracle) as chosen:
            expected = oracle(torch.tensor([ids])).logits[0].numpy()
        flipped = _flipped(config, run, [layer[0].numpy() for layer in chosen])
        assert flipped.mean() <= MAX_FLIPPED, f"{flipped.sum()} of {len(ids)} rows chose other keys"
        if flipped.any():
            chosen_by_run = [torch.from_numpy(run.taps[f"topk_indices.{i}"])[None] for i in range(len(chosen))]
            with torch.inference_mode(), inject_selection(oracle, chosen_by_run):
                expected = oracle(torch.tensor([ids])).logits[0].numpy()
        error = relative_error(run.logits, expected)
        assert error.max() <= GATE, f"{mode} at {context}: {error.max():.2e} of the spread, gate {GATE:g}"


def _flipped(config: ModelConfig, run: Run, chosen: list[np.ndarray]) -> np.ndarray:
    """Rows whose set of keys differs in any layer; the oracle fills rows with fewer visible keys at will."""
    length = len(run.logits)
    rows = np.zeros(length, bool)
    for layer, expected in enumerate(chosen):
        keys = run.taps[f"topk_indices.{layer}"]
        for position in range(min(config.index_topk, length), length):
            rows[position] |= set(keys[position].tolist()) != set(expected[position].tolist())
    return rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_logits_equal_transformers(
    tiny_config: ModelConfig, tiny_source: Checkpoint, oracle: Any, session: TorchSession, context: int, mode: str
) -> None:
    compare_with_oracle(tiny_config, tiny_source, oracle, context, mode, session)


@pytest.mark.parametrize("context", (10, 64, 65, 200))
def test_mtp_logits_equal_a_composition_of_transformers_layers(
    tiny_config: ModelConfig,
    tiny_source: Checkpoint,
    mtp_oracle: tuple[Any, dict[str, torch.Tensor]],
    context: int,
) -> None:
    compare_mtp(tiny_config, tiny_source, mtp_oracle, context)


def compare_mtp(
    config: ModelConfig, source: Checkpoint, mtp_oracle: tuple[Any, dict[str, torch.Tensor]], context: int
) -> None:
    """Assert the MTP module's logits on random hidden states, whole and in two chunks."""
    model, combine = mtp_oracle
    ids = tokens(context, seed=3)
    hidden = torch.randn(1, context, config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = mtp_logits(model, combine, torch.tensor([ids]), hidden)[0].numpy()
    blocks = list(range(1, 2 + context // 64))
    for border in (context, context // 2):
        session = TorchSession(Settings(config, EXACT), source, len(blocks) + 1)
        logits = []
        for part in (slice(0, border), slice(border, context)):
            if ids[part]:
                step = replace(lay_out([ids[part]], [part.start], [blocks]), hidden_in=hidden[:, part].numpy())
                logits.append(session.run(step, graph=MTP).fetch("logits"))
        error = relative_error(np.concatenate(logits), expected)
        assert error.max() <= GATE, f"MTP at {context}: {error.max():.2e} of the spread"


# --- bend it, and the comparison must notice (the mistakes that others shipped: spec §10) --------------


def test_an_interleaved_indexer_rope_is_noticed_beyond_index_topk(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, tiny_source: Checkpoint, oracle: Any
) -> None:
    monkeypatch.setattr(Attention, "index_rope", staticmethod(layers.rope_interleaved))
    compare_with_oracle(tiny_config, tiny_source, oracle, 64, "whole")  # invisible while everything is selected
    with pytest.raises(AssertionError, match="chose other keys"):
        compare_with_oracle(tiny_config, tiny_source, oracle, 200, "whole")


def test_a_key_norm_without_bias_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, tiny_source: Checkpoint, oracle: Any
) -> None:
    def without_bias(self: attention.KeyNorm, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (x.shape[-1],), self.weight, None, attention.K_NORM_EPS)

    monkeypatch.setattr(attention.KeyNorm, "forward", without_bias)
    with pytest.raises(AssertionError, match="chose other keys"):
        compare_with_oracle(tiny_config, tiny_source, oracle, 200, "whole")


def test_expert_weights_from_biased_scores_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, tiny_source: Checkpoint, oracle: Any
) -> None:
    right = moe_route_reference.biased_scores

    def biased(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _, selecting = right(*args)
        return selecting.nan_to_num(neginf=0.0), selecting

    monkeypatch.setattr(moe_route_reference, "biased_scores", biased)
    with pytest.raises(AssertionError, match="of the spread"):
        compare_with_oracle(tiny_config, tiny_source, oracle, 10, "whole")


class _ShiftedBias:
    """A source whose router biases are lower by 4, so that every biased score is negative."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source

    def tensor(self, name: str) -> np.ndarray:
        value = self._source.tensor(name)
        return value - np.float32(4) if name.endswith("e_score_correction_bias") else value


def test_a_group_mask_of_zero_is_noticed_when_all_biased_scores_are_negative(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, tiny_source: Checkpoint, oracle: Any
) -> None:
    moved = [layer.mlp.gate.e_score_correction_bias for layer in oracle.model.layers if hasattr(layer.mlp, "gate")]
    for bias in moved:
        bias.data -= 4
    try:
        shifted: Any = _ShiftedBias(tiny_source)
        compare_with_oracle(tiny_config, shifted, oracle, 65, "whole")
        right = moe_route_reference.biased_scores

        def masked_with_zero(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            scores, selecting = right(*args)
            return scores, selecting.masked_fill(selecting == -torch.inf, 0.0)

        monkeypatch.setattr(moe_route_reference, "biased_scores", masked_with_zero)
        with pytest.raises(AssertionError, match="of the spread"):
            compare_with_oracle(tiny_config, shifted, oracle, 10, "whole")
    finally:
        for bias in moved:
            bias.data += 4


class _SwappedHalves:
    """A source whose MTP projection takes the hidden state first."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source

    def tensor(self, name: str) -> np.ndarray:
        value = self._source.tensor(name)
        if not name.endswith("eh_proj.weight"):
            return value
        half = value.shape[1] // 2
        return np.concatenate([value[:, half:], value[:, :half]], axis=1)


def test_swapped_halves_of_the_mtp_projection_are_noticed(
    tiny_config: ModelConfig, tiny_source: Checkpoint, mtp_oracle: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    swapped: Any = _SwappedHalves(tiny_source)
    with pytest.raises(AssertionError, match="of the spread"):
        compare_mtp(tiny_config, swapped, mtp_oracle, 10)
