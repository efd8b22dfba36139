"""Names, shapes and totals against the published numbers of DeepSeek-V3.2 (spec §2.3, §2.4)."""

from __future__ import annotations

import pytest

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.schema import ExpectedTensor, expected_tensors, totals
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.weight_recipes.stored import scale_shape

FULL = expected_tensors(load_preset("full").config)


def with_values(**values: int) -> ModelConfig:
    raw = {**load_preset("tiny").config_json, **values}
    return ModelConfig.parse(raw, "test")


def in_layer(layer: int) -> dict[str, ExpectedTensor]:
    return {name: tensor for name, tensor in FULL.items() if name.startswith(f"model.layers.{layer}.")}


def test_full_model_has_the_published_totals() -> None:
    size = totals(FULL)
    assert size.num_tensors == 92_425
    assert size.num_parameters == 685_355_329_792
    assert size.num_bytes == 689_469_018_240


def test_full_model_has_the_published_elements_per_dtype() -> None:
    counts = dict.fromkeys(("f8e4m3", "bf16", "f32"), 0)
    for tensor in FULL.values():
        counts[tensor.dtype] += tensor.num_elements
    assert counts == {"f8e4m3": 681_408_069_632, "bf16": 3_947_229_184, "f32": 30_976 + 41_591_584}


@pytest.mark.parametrize(("layer", "count"), [(0, 27), (2, 27), (3, 1565), (60, 1565), (61, 1571)])
def test_layers_have_the_published_tensor_counts(layer: int, count: int) -> None:
    assert len(in_layer(layer)) == count


def test_layers_have_the_published_bytes() -> None:
    assert sum(tensor.num_bytes for tensor in in_layer(0).values()) == 598_064_576
    assert sum(tensor.num_bytes for tensor in in_layer(3).values()) == 11_526_369_728


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.embed_tokens.weight", "bf16", (129280, 7168)),
        ("lm_head.weight", "bf16", (129280, 7168)),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "f8e4m3", (576, 7168)),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "f32", (5, 56)),
        ("model.layers.0.self_attn.indexer.k_norm.bias", "f32", (128,)),
        ("model.layers.0.self_attn.indexer.weights_proj.weight", "bf16", (64, 7168)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "f32", (256,)),
        ("model.layers.60.mlp.experts.255.down_proj.weight_scale_inv", "f32", (56, 16)),
        ("model.layers.61.eh_proj.weight", "bf16", (7168, 14336)),
        ("model.layers.61.shared_head.head.weight", "bf16", (129280, 7168)),
    ],
)
def test_tensors_of_the_full_model(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert FULL[name] == ExpectedTensor(dtype, shape)


def test_every_fp8_weight_is_followed_by_its_scale() -> None:
    names = list(FULL)
    for name, after in zip(names, [*names[1:], ""]):
        if FULL[name].dtype == "f8e4m3":
            assert after == name + "_scale_inv"
            assert FULL[after].shape == scale_shape(FULL[name].shape)


def test_without_mtp_nothing_lies_beyond_the_last_layer() -> None:
    with_mtp, without = expected_tensors(with_values()), expected_tensors(with_values(num_nextn_predict_layers=0))
    assert {name for name in with_mtp if name.startswith("model.layers.4.")} == with_mtp.keys() - without.keys()


def test_shared_experts_widen_one_mlp() -> None:
    prefix = "model.layers.1.mlp.shared_experts."
    tensors = expected_tensors(with_values(n_shared_experts=2))
    assert tensors[prefix + "gate_proj.weight"].shape == (512, 512)
    assert tensors[prefix + "down_proj.weight_scale_inv"].shape == (4, 4)


def test_all_layers_may_be_dense() -> None:
    tensors = expected_tensors(with_values(first_k_dense_replace=4))
    assert not any(".mlp.experts." in name for name in tensors if not name.startswith("model.layers.4."))
    assert "model.layers.4.mlp.gate.weight" in tensors  # the MTP layer always has experts
