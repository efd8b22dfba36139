"""The mass of attention inside a choice of keys, against attention that is worked out anew from the model's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support.random_nano import random_nano_checkpoint

from seekforge.exporter.models.shared.layers import rope_interleaved
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.quality.recall import measure_recall
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import EXACT

IDS = np.random.default_rng(3).integers(16, 1000, 90).tolist()
TOPK = 32


def test_a_choice_holds_the_mass_that_it_holds(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = random_nano_checkpoint(tmp_path_factory)
    config = ModelConfig.load(checkpoint)
    every = np.arange(90)[None, :] <= np.arange(90)[:, None]
    nothing = np.full((90, TOPK), -1, np.int32)
    first = np.where(np.arange(TOPK)[None, :] <= np.arange(90)[:, None], np.arange(TOPK)[None, :], -1).astype(np.int32)
    all_keys = np.where(every, np.arange(90)[None, :], -1).astype(np.int32)
    with Checkpoint.open(checkpoint) as source:
        session = TorchSession(Settings(config, EXACT, form="naive"), source)
        chosen = session.prefill(IDS)["topk_indices.0"][0].numpy()
        choices = {
            "same": {7: {0: chosen}},
            "none": {7: {0: nothing}},
            "first": {7: {0: first}},
            "all": {7: dict.fromkeys(range(3), all_keys)},
            "other row": {8: {0: nothing}},
        }
        recalls = measure_recall(config, source, {7: IDS}, choices, reference="exact")
        mass = dense_attention(session)
    assert recalls.keys() == {"exact", "same", "none", "first", "all"}
    assert recalls["none"].inside == 0 and recalls["none"].best == recalls["first"].best
    assert recalls["all"].inside == pytest.approx(1, abs=1e-5) and recalls["all"].layers.keys() == {"0", "1", "2"}
    assert recalls["same"].inside == pytest.approx(recalls["exact"].layers["0"]) and recalls["exact"].num_queries == 58
    expected = mass[TOPK:, :TOPK].sum(-1).mean()
    assert recalls["first"].inside == pytest.approx(float(expected), rel=1e-4)
    best = np.sort(mass[TOPK:], axis=-1)[:, -TOPK:].sum(-1).mean()
    assert recalls["first"].best == pytest.approx(float(best), rel=1e-4)
    assert all(recall.inside <= recall.best + 1e-6 for name, recall in recalls.items() if name != "all")


def dense_attention(session: TorchSession) -> np.ndarray:
    """Layer 0's probabilities over all keys, by expanded keys of each head, mean over heads: [90, 90]."""
    module = session.module()
    layer, config = module.layers["0"], session.settings.config
    attention = layer.self_attn
    positions = torch.arange(90)[None]
    step = module.make_step(positions, positions, torch.arange(2, dtype=torch.int32)[None])
    with torch.inference_mode():
        x = layer.input_layernorm(module.embed_tokens(torch.tensor([IDS])))
        q_raw, _, c_raw, k_pe = attention.qkv_a_proj(x).split(attention.splits, dim=-1)
        q_nope, q_pe = attention.queries(attention.q_a_layernorm(q_raw), step)
        c = attention.kv_a_layernorm(c_raw)[0]
        k_pe = rope_interleaved(k_pe, step.cos, step.sin)[0]
        k_nope = c @ attention.w_uk.transpose(1, 2)  # [heads, keys, nope]
        scores = q_nope.transpose(0, 1) @ k_nope.transpose(1, 2) + q_pe[0].transpose(0, 1) @ k_pe.T
        later = torch.ones(90, 90, dtype=torch.bool).triu(1)
        return torch.softmax((scores * config.softmax_scale).masked_fill(later, -torch.inf), -1).mean(0).numpy()
