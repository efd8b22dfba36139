"""`quantization_config` of other writers, and models of another type's name: read by equal facts, else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.presets import DTYPES, load_preset, stored_as
from seekforge.exporter.checkpoint.schema import expected_tensors, totals
from seekforge.exporter.sizing.matrices import active_parameters, checkpoint_bytes, num_parameters
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.quantization_forms import leaves_out, plain_quantization
from seekforge.formats.numerics import BF16, EXACT, FP8

#: moonshotai/Kimi-K2-Instruct, where it differs from DeepSeek-V3.
KIMI_K2: dict[str, Any] = {
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827, "vocab_size": 163840, "max_position_embeddings": 131072, "bos_token_id": 163584,
    "eos_token_id": 163585,
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def plain(**quantization: Any) -> Any:
    return plain_quantization({"quantization_config": quantization}, "config.json")[0]


def test_kimi_k2_is_deepseek_v3_by_another_name() -> None:
    raw = load_preset("v3-full").config_json | KIMI_K2
    config = ModelConfig.parse(raw, "kimi")
    assert config.model_type == "deepseek_v3" and config.mtp_layer is None
    assert num_parameters(config) == pytest.approx(1.026e12, rel=2e-3)
    assert active_parameters(config) == pytest.approx(32.9e9, rel=2e-2)
    with pytest.raises(ConfigError, match=r"architectures \['KimiForCausalLM'\], expected \['DeepseekV3ForCausalLM'\]"):
        ModelConfig.parse(raw | {"architectures": ["KimiForCausalLM"]}, "kimi")


def test_v3_full_has_the_bytes_of_the_released_checkpoint() -> None:
    config = load_preset("v3-full").config
    assert checkpoint_bytes(config) == 688_574_839_360
    raw = dict(load_preset("v3-full").config_json)
    raw["quantization_config"] = {key: v for key, v in raw["quantization_config"].items() if key != "scale_fmt"}
    assert ModelConfig.parse(raw, "V3 and R1").first_difference(config) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_form_is_read_as_itself(dtype: str) -> None:
    config = stored_as(load_preset("tiny"), dtype).config
    again = ModelConfig.parse(config.model_dump(mode="json"), "program.json")
    assert again == config and again.first_difference(config) is None
    assert config.keeps_weights(EXACT) and config.keeps_weights(BF16) and not config.keeps_weights(FP8)


def test_the_bytes_of_a_form_are_those_of_its_tensors() -> None:
    tiny = load_preset("tiny").config
    sizes = {dtype: checkpoint_bytes(stored_as(load_preset("tiny"), dtype).config) for dtype in DTYPES}
    bf16 = stored_as(load_preset("tiny"), "bf16").config
    assert sizes["bf16"] == totals(expected_tensors(bf16)).num_bytes > 1.5 * checkpoint_bytes(tiny)
    assert sizes["nvfp4"] < checkpoint_bytes(tiny)
    assert totals(expected_tensors(bf16)).num_parameters == totals(expected_tensors(tiny)).num_parameters


@pytest.mark.parametrize(
    ("pattern", "module", "is_left_out"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.3.self_attn*", "model.layers.3.self_attn.q_a_proj", True),
        ("model.layers.3.self_attn*", "model.layers.31.self_attn.q_a_proj", False),
        ("model.layers.3", "model.layers.3.mlp.gate_proj", True),  # what belongs to a module
        ("model.layers.3", "model.layers.30.mlp.gate_proj", False),
        ("*self_attn*", "model.layers.0.self_attn.o_proj", True),
    ],
)
def test_patterns_of_names(pattern: str, module: str, is_left_out: bool) -> None:
    assert leaves_out([pattern], module) is is_left_out and leaves_out(["x", pattern, "y"], module) is is_left_out


@pytest.mark.parametrize(
    ("expression", "pattern"),
    [("re:.*self_attn.*", "*self_attn*"), (r"re:.*mlp\.gate$", "*mlp.gate"), ("re:^lm_head", "lm_head*")],
)
def test_expressions_become_patterns(expression: str, pattern: str) -> None:
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    stored = plain(quant_method="compressed-tensors", config_groups=groups, ignore=[expression])
    assert stored == {"quant_method": "compressed-tensors", "form": "ct_fp8_channel", "ignore": [pattern]}


@pytest.mark.parametrize("key", ["transform_config", "sparsity_config"])
def test_weights_that_were_transformed_are_refused(key: str) -> None:
    """Rotated ones have the tensors of plain ones, and would give wrong text."""
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}}
    said = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []}
    assert plain(**said, **{key: {}}) == plain(**said, **{key: {"format": "dense"}}) == plain(**said)
    with pytest.raises(ConfigError, match=rf"quantization_config\.{key} is .*'R3'"):
        plain(**said, **{key: {"config_groups": {"R3": {"type": "hadamard"}}}})


def test_modelopt_writes_its_words_one_level_down_too() -> None:
    inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    stored = plain(quant_method="modelopt", quantization=inner)
    assert stored == {"quant_method": "modelopt", "form": "nvfp4", "ignore": ["lm_head"]}


def test_modelopt_may_say_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    raw = {key: value for key, value in load_preset("tiny").config_json.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.load(tmp_path).stored_form == "bf16"
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert ModelConfig.load(tmp_path).stored_form == "nvfp4"


@pytest.mark.parametrize(
    ("config", "said", "line"),
    [
        ({}, "null", r"hf_quant_config\.json: quantization_config\.quant_method is None"),
        ({}, "[1]", r"hf_quant_config\.json: quantization_config is \[1\]"),
        ({}, "{", r"hf_quant_config\.json: not valid JSON"),
        ({}, '{"quantization": {"quant_algo": "MIXED_PRECISION"}}', r"hf_quant_config\.json: .*'MIXED_PRECISION'"),
        ({"hidden_size": -1}, '{"quantization": {"quant_algo": "NVFP4"}}', r"/config\.json: the key 'hidden_size'"),
        ({"compression_config": {"quant_method": "gptq"}}, "null", r"/config\.json: .*'gptq' \(GPTQ\)"),
    ],
)
def test_a_fault_is_named_where_it_stands(config: dict[str, Any], said: str, line: str, tmp_path: Path) -> None:
    raw = load_preset("tiny").config_json | config
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "hf_quant_config.json").write_text(said)
    with pytest.raises(ConfigError, match=line):
        ModelConfig.load(tmp_path)


def test_modules_that_are_left_out_are_bf16() -> None:
    config = stored_as(load_preset("tiny"), "nvfp4").config
    tensors = expected_tensors(config)
    assert tensors["model.layers.1.self_attn.o_proj.weight"].dtype == "bf16"
    assert tensors["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == "u8"
    assert "model.layers.1.mlp.experts.0.up_proj.weight_scale_2" in tensors
