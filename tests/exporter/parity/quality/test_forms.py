"""Forms of the PyTorch model: each rounds what it says and nothing else, and counts the bytes that this would take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.random_nano import random_nano_checkpoint

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models import family_of
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.quality.forms import FORMS, WeightSizes
from seekforge.exporter.parity.quality.torch_run import run_rows
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import EXACT
from seekforge.formats.quality_run import RunRow
from seekforge.formats.quantization import nvfp4
from seekforge.plugins.quant import INDEX_KEY_BYTES, dequantize_weight, latent_record_bytes

IDS = tuple(range(20, 90))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_nano_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> ModelConfig:
    return ModelConfig.load(checkpoint)


def test_every_form_computes_something_else_than_exact_and_close_to_it(checkpoint: Path, config: ModelConfig) -> None:
    with Checkpoint.open(checkpoint) as source:
        plain = TorchSession(Settings(config, EXACT), source).prefill(IDS)["logits"]
        logits = {name: form.session(config, source).prefill(IDS)["logits"].float() for name, form in FORMS.items()}
    spread = float(plain.std())
    assert torch.equal(logits.pop("exact"), plain)
    for name, other in logits.items():
        error = float((other - plain).square().mean().sqrt()) / spread
        assert 1e-4 < error < 0.6, (name, error)


def test_nvfp4_weights_are_the_checkpoints_rounded_along_k(checkpoint: Path, config: ModelConfig) -> None:
    with Checkpoint.open(checkpoint) as source:
        layers = FORMS["nvfp4"].session(config, source).module().layers
        exact = TorchSession(Settings(config, EXACT), source).module().layers
        o_proj = dequantize_weight(exact["1"].self_attn.o_proj.weight, exact["1"].self_attn.o_proj.weight_scale)
        assert np.array_equal(layers["1"].self_attn.o_proj.weight, nvfp4.round_trip(o_proj.numpy()))
        w2 = dequantize_weight(exact["2"].mlp.experts.w2[3], exact["2"].mlp.experts.w2_scale[3])
        assert np.array_equal(layers["2"].mlp.experts.down[3].weight, nvfp4.round_trip(w2.numpy()))
        assert not torch.equal(layers["0"].self_attn.w_uk, exact["0"].self_attn.w_uk)
        assert torch.equal(layers["1"].mlp.gate.weight, exact["1"].mlp.gate.weight)


def test_nvfp4_experts_are_what_engines_make_of_fp8_blocks_and_nothing_else_changes(
    checkpoint: Path, config: ModelConfig
) -> None:
    with Checkpoint.open(checkpoint) as source:
        layers = FORMS["nvfp4_experts"].session(config, source).module().layers
        exact = TorchSession(Settings(config, EXACT), source).module().layers
        parts = [f"model.layers.2.mlp.experts.3.{name}_proj.weight" for name in ("gate", "up")]
        stored = np.concatenate([source.tensor(name) for name in parts])
        scales = np.concatenate([source.tensor(f"{name}_scale_inv") for name in parts])
    steps = nvfp4.second_scales(scales).repeat(128, 0).repeat(128, 1)
    w13 = nvfp4.from_rows(nvfp4.rows_of_fp8(stored)) * steps
    assert np.array_equal(layers["2"].mlp.experts.w13[3], w13)
    changed = {
        name
        for (name, a), (_, b) in zip(layers.named_parameters(), exact.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {f"{layer}.mlp.experts.{name}" for layer in (1, 2) for name in ("w13", "w2")}


def test_caches_hold_what_their_form_can_hold(checkpoint: Path, config: ModelConfig) -> None:
    rank = config.kv_lora_rank
    with Checkpoint.open(checkpoint) as source:
        sessions = {name: FORMS[name].session(config, source) for name in ("kv_bf16", "kv_nvfp4", "bf16")}
        for session in sessions.values():
            session.prefill(IDS)
    assert sessions["kv_bf16"].caches["index_cache.1"].dtype == torch.bfloat16
    assert sessions["kv_bf16"].settings.dtype == torch.float32 and sessions["bf16"].settings.dtype == torch.bfloat16
    latent = sessions["kv_nvfp4"].cache("latent_cache.2")[64 : 64 + len(IDS)]
    assert latent[:, :rank].any() and np.array_equal(nvfp4.round_trip(latent[:, :rank], 1.0), latent[:, :rank])
    assert not np.array_equal(nvfp4.round_trip(latent[:, rank:], 1.0), latent[:, rank:])


def test_bytes_are_those_of_the_layouts(config: ModelConfig) -> None:
    # nano: latents of 128 and rotary keys of 64 values, indexer keys of 128, three layers and the MTP module
    bytes_of = {name: form.cache_bytes(config) for name, form in FORMS.items()}
    assert bytes_of["exact"] == 4 * (128 + 64 + 128) * 4 and bytes_of["kv_bf16"] * 2 == bytes_of["exact"]
    assert bytes_of["fp8"] == bytes_of["kv_fp8"] == 4 * (128 + 4 + 2 * 64 + 132)
    assert bytes_of["kv_nvfp4"] == 4 * (128 * 0.5625 + 2 * 64 + 132)
    sizes = WeightSizes(fp8=1600, experts=800, others=30, scales=4)
    assert FORMS["exact"].weight_bytes(sizes) == 1634 and FORMS["nvfp4"].weight_bytes(sizes) == 930
    assert FORMS["nvfp4_experts"].weight_bytes(sizes) == 1634 - 800 * 7 / 16


def test_layers_that_share_an_indexers_choice_cache_no_keys_of_it() -> None:
    config = load_preset("glm5-tiny").config
    layers = range(config.num_hidden_layers + 1)
    kinds = [family_of(config).caches(config, layer) for layer in layers]
    with_index = sum("index_cache" in kind for kind in kinds)
    assert 0 < with_index < len(kinds)
    assert FORMS["bf16"].cache_bytes(config) == 2 * sum(sum(kind.values()) for kind in kinds)
    latents = latent_record_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
    assert FORMS["fp8"].cache_bytes(config) == latents * len(kinds) + INDEX_KEY_BYTES * with_index


def test_rows_in_a_batch_give_what_they_give_alone(checkpoint: Path, config: ModelConfig) -> None:
    rows = [RunRow(ids=IDS[:5], max_tokens=6), RunRow(ids=IDS, max_tokens=0), RunRow(ids=IDS[:61], max_tokens=9)]
    with Checkpoint.open(checkpoint) as source:
        session = TorchSession(Settings(config, EXACT), source)
        completions, nll_sums = run_rows(session, rows, ())
        for number in (0, 2):
            ids = list(rows[number].ids)
            for _ in range(rows[number].max_tokens):
                ids.append(int(session.prefill(ids)["logits"][-1].argmax()))
            assert completions[number] == tuple(ids[len(rows[number].ids) :])
        logits = session.prefill(IDS)["logits"].double()
        ended, _ = run_rows(session, rows, {completions[0][2]})
    likely = torch.log_softmax(logits, -1)[range(len(IDS) - 1), list(IDS[1:])]
    assert nll_sums[0] is None and completions[1] == () and nll_sums[1] == pytest.approx(-float(likely.sum()), rel=1e-6)
    assert ended[0] == completions[0][: completions[0].index(completions[0][2]) + 1]
