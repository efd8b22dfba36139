"""config.json: what is refused, and how the refusal names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.formats.checkpoint.model_config import ModelConfig


@pytest.fixture
def raw() -> dict[str, Any]:
    return json.loads(json.dumps(load_preset("tiny").config_json))


def test_derived_constants_of_the_full_model_are_those_of_the_spec() -> None:
    full = load_preset("full").config
    assert full.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-15)
    assert full.index_scale == pytest.approx(0.011048543456039806, rel=1e-15)
    assert (full.qk_head_dim, full.latent_dim, full.mtp_layer) == (192, 576, 61)
    assert [full.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


@pytest.mark.parametrize("key", sorted(ModelConfig.model_fields.keys() - {"quantization_config"}))  # BF16 has none
def test_every_missing_key_is_named(raw: dict[str, Any], key: str) -> None:
    del raw[key]
    with pytest.raises(ConfigError, match=key if key != "model_type" else "model_type is None"):
        ModelConfig.parse(raw, "config.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", "7168", "'hidden_size' is '7168'"),
        ("hidden_size", 500, "hidden_size is 500, expected a multiple of 128"),
        ("num_hidden_layers", 0, "'num_hidden_layers' is 0"),
        ("num_hidden_layers", 4.5, "'num_hidden_layers' is 4.5"),
        ("scoring_func", "softmax", "'scoring_func' is 'softmax'"),
        ("norm_topk_prob", False, "'norm_topk_prob' is False"),
        ("tie_word_embeddings", True, "'tie_word_embeddings' is True"),
        ("index_head_dim", 64, "index_head_dim is 64, expected 128"),
        ("topk_group", 9, "topk_group is 9, expected at most n_group 4"),
        ("n_group", 3, "n_routed_experts is 16 over n_group 3"),
        ("num_experts_per_tok", 22, "num_experts_per_tok is 22, expected at most the 8 experts"),
        ("first_k_dense_replace", 5, "first_k_dense_replace is 5"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling.type"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, expected at most 1000"),
        ("n_routed_experts", 10**9, "n_routed_experts is 1000000000 in each of 4 layers, expected at"),
        ("eos_token_id", [1, "2"], "eos_token_id.1' is '2', expected a whole number"),
        ("indexer_rope_interleave", True, "indexer_rope_interleave is true"),
        ("index_topk_freq", 4, "index_topk_freq is 4"),
        ("model_type", "deepseek_v2", "model_type is 'deepseek_v2', expected 'deepseek_v32' or 'deepseek_v3'"),
        ("model_type", ["deepseek_v3"], r"model_type is \['deepseek_v3'\], expected 'deepseek_v32' or"),
        ("model_type", "deepseek_v3", "'index_n_heads' is 16"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(raw: dict[str, Any], key: str, value: Any, message: str) -> None:
    raw[key] = value
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.parse(raw, "config.json")
    assert "\n" not in str(error.value)


def test_a_demo_config_is_answered_with_the_right_file() -> None:
    with pytest.raises(ConfigError, match=r"pass the checkpoint's config\.json"):
        ModelConfig.parse({"dim": 7168, "n_activated_experts": 8}, "config.json")


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "holds a JSON list")])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        ModelConfig.load(tmp_path)


def test_null_says_nothing(raw: dict[str, Any]) -> None:
    raw |= {"rope_scaling": None, "num_nextn_predict_layers": None, "architectures": None}
    config = ModelConfig.parse(raw, "config.json")
    assert config.rope_scaling.factor == 1 and config.mtp_layer is None
    assert config.architectures == ("DeepseekV32ForCausalLM",)


def test_keys_that_change_nothing_are_kept(raw: dict[str, Any]) -> None:
    raw["some_note"] = "kept"
    assert ModelConfig.parse(raw, "config.json").model_dump()["some_note"] == "kept"
