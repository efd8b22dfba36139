"""Ways of computing the same thing agree: naive and absorbed, sparse and dense, one layer range or several."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.parity import (
    CONTEXTS,
    GATE,
    MAX_FLIPPED,
    assert_same,
    drive,
    relative_error,
    tokens,
)

import seekforge.exporter.models.shared.sparse.attention as attention
from seekforge.exporter.models.shared.layers import rope_half_split
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import EXACT, FP8
from seekforge.formats.step_io import INTERMEDIATE_TENSORS, lay_out


def _logits(settings: Settings, source: Checkpoint, context: int) -> np.ndarray:
    return TorchSession(settings, source).prefill(tokens(context))["logits"].numpy()


@pytest.mark.parametrize("context", CONTEXTS)
def test_naive_attention_equals_absorbed(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, tiny_source: Checkpoint, context: int
) -> None:
    chosen: list[torch.Tensor] = []
    free: list[torch.Tensor] = []
    indexer = attention.dsa_indexer

    def record(*args: Any) -> torch.Tensor:
        chosen.append(indexer(*args))
        return chosen[-1]

    def replay(*args: Any) -> torch.Tensor:
        free.append(indexer(*args))
        return chosen[len(free) - 1]

    monkeypatch.setattr(attention, "dsa_indexer", record)
    absorbed = _logits(Settings(tiny_config, EXACT), tiny_source, context)
    monkeypatch.setattr(attention, "dsa_indexer", replay)
    naive = _logits(Settings(tiny_config, EXACT, form="naive"), tiny_source, context)
    assert relative_error(naive, absorbed).max() <= 1e-5
    # left to itself, the naive form would have chosen the same keys but for rows at a boundary
    flipped = torch.stack([(a != b).any(-1)[0] for a, b in zip(chosen, free, strict=True)]).any(0)
    assert flipped.float().mean() <= MAX_FLIPPED


@pytest.mark.parametrize("context", (10, 63, 64))
def test_sparse_equals_dense_while_the_context_fits_index_topk(
    tiny_config: ModelConfig, tiny_source: Checkpoint, context: int
) -> None:
    sparse = _logits(Settings(tiny_config, EXACT), tiny_source, context)
    everything = tiny_config.model_copy(update={"index_topk": 4096})
    dense = _logits(Settings(everything, EXACT), tiny_source, context)
    assert np.array_equal(sparse, dense)


def test_sparse_differs_from_dense_beyond_index_topk(tiny_config: ModelConfig, tiny_source: Checkpoint) -> None:
    sparse = _logits(Settings(tiny_config, EXACT), tiny_source, 200)
    everything = tiny_config.model_copy(update={"index_topk": 4096})
    dense = _logits(Settings(everything, EXACT), tiny_source, 200)
    assert np.array_equal(sparse[:64], dense[:64])
    assert relative_error(sparse[100:], dense[100:]).min() > 100 * GATE


class _ScrambledIndexer:
    """A source with other indexer weights."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source

    def tensor(self, name: str) -> np.ndarray:
        value = self._source.tensor(name)
        return value[::-1] if ".indexer.w" in name and "scale" not in name else value


def test_the_indexer_does_not_matter_while_the_context_fits(tiny_config: ModelConfig, tiny_source: Checkpoint) -> None:
    scrambled: Any = _ScrambledIndexer(tiny_source)
    settings = Settings(tiny_config, EXACT)
    # only the shared product of the first projection may round differently
    assert relative_error(_logits(settings, scrambled, 64), _logits(settings, tiny_source, 64)).max() <= 1e-5
    assert relative_error(_logits(settings, scrambled, 200), _logits(settings, tiny_source, 200)).max() > 100 * GATE


@pytest.mark.parametrize("mode", ("chunked", "decode"))
def test_cached_bytes_do_not_depend_on_how_a_prompt_is_cut(
    tiny_config: ModelConfig, tiny_source: Checkpoint, mode: str
) -> None:
    ids = tokens(80)
    sessions = [TorchSession(Settings(tiny_config, EXACT), tiny_source) for _ in range(2)]
    whole = drive(sessions[0], [ids], "whole")[0]
    cut = drive(sessions[1], [ids], mode)[0]
    assert_same(cut, whole, mode)
    for name, of_whole in sessions[0].caches.items():
        used = of_whole[64:].abs().amax(1) > 0
        assert int(used.sum()) == 80
        # rows of a larger product may be summed in another order: equal but for the last bits
        assert torch.allclose(sessions[1].caches[name][64:], of_whole[64:], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("border", (1, 2, 3))
@pytest.mark.parametrize("numerics", (EXACT, FP8), ids=lambda numerics: numerics.name)
def test_two_layer_ranges_equal_the_whole_bit_for_bit(
    tiny_config: ModelConfig, tiny_source: Checkpoint, border: int, numerics: Any
) -> None:
    settings, ids = Settings(tiny_config, numerics), tokens(100)
    whole = TorchSession(settings, tiny_source).prefill(ids)
    last = tiny_config.num_hidden_layers
    first = TorchSession(settings, tiny_source, 5, layer_range=(0, border))
    second = TorchSession(settings, tiny_source, 5, layer_range=(border, last))
    step = lay_out([ids], [0], [[1, 2]])
    between = first.run(step)
    tensors = {name: between.fetch(name) for name in INTERMEDIATE_TENSORS}
    result = second.run(replace(step, intermediate_tensors=tensors))
    assert torch.equal(result["logits"], whole["logits"])
    assert torch.equal(result[f"topk_indices.{last - 1}"], whole[f"topk_indices.{last - 1}"])


def test_bf16_activations_stay_near_f32(tiny_config: ModelConfig, tiny_source: Checkpoint) -> None:
    exact = _logits(Settings(tiny_config, EXACT), tiny_source, 64)
    bf16 = _logits(Settings(tiny_config, EXACT, activations="bf16"), tiny_source, 64)
    # spec §11: cosine-like difference; selection plays no part at 64 tokens, experts may still flip
    difference = 1 - 2 * (exact * bf16).sum() / ((exact**2).sum() + (bf16**2).sum())
    assert 0 < difference < 1e-2


def test_padding_changes_nothing_outside_the_scrap_block(tiny_config: ModelConfig, tiny_source: Checkpoint) -> None:
    ids = tokens(20)
    settings = Settings(tiny_config, FP8, activations="f32")
    alone = TorchSession(settings, tiny_source, 6)
    padded = TorchSession(settings, tiny_source, 6)
    plain = alone.run(lay_out([ids[:3]], [0], [[2]]))
    longer = padded.run(lay_out([ids[:3], ids], [0, 0], [[2], [4]]))
    for name, cache in padded.caches.items():
        block = slice(2 * 64, 3 * 64)
        assert torch.allclose(cache[block], alone.caches[name][block], rtol=1e-4, atol=1e-4)
        assert not cache[block][3:].any(), "a padded row wrote into a block of its sequence"
        assert not cache[64 : 2 * 64].any() and not cache[3 * 64 : 4 * 64].any() and not cache[5 * 64 :].any()
    assert relative_error(longer["logits"][:3].numpy(), plain["logits"].numpy()).max() <= GATE


def test_the_key_norm_uses_its_own_epsilon() -> None:
    assert attention.K_NORM_EPS == 1e-6


@pytest.mark.parametrize("num_heads", [1, 4])
def test_index_queries_have_an_axis_of_heads_however_many(tiny_config: ModelConfig, num_heads: int) -> None:
    settings = Settings(tiny_config.model_copy(update={"index_n_heads": num_heads}), EXACT)
    indexer, dim = attention.Indexer(settings, rope_half_split), tiny_config.index_head_dim
    half = tiny_config.qk_rope_head_dim // 2
    step = SimpleNamespace(cos=torch.ones(2, 3, half), sin=torch.zeros(2, 3, half), hadamard=None)
    x = torch.randn(2, 3, num_heads * dim)
    assert torch.equal(indexer.rotate(x, step, num_heads), x.view(2, 3, num_heads, dim))  # pyright: ignore
    assert indexer.rotate(x[..., :dim], step).shape == (2, 3, dim)  # pyright: ignore
