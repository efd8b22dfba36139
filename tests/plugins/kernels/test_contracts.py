"""What operators refuse: one table, read by export, build and documentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.common.errors import ConfigError, ShapeError
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.program.cli import export as export_command
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import Parallelism
from seekforge.plugins.kernels.constraints import (
    Rule,
    between,
    check_rules,
    exactly,
    multiple,
    one_of,
    power_of_two,
    rule,
)
from seekforge.plugins.kernels.contracts import export_warnings, limits, refusals
from seekforge.plugins.kernels.launch_plan import op_kernels, statics_of
from seekforge.plugins.kernels.sizes import operators
from seekforge.plugins.registry import ADD_RMS_NORM_QUANTIZE, BF16_LINEAR, BLOCK_FP8_LINEAR, WITH_KERNELS

V32 = load_preset("full").config


def changed(**values: int) -> ModelConfig:
    return V32.model_copy(update=values)


@pytest.mark.parametrize("preset", ["tiny", "small", "full"])
def test_every_preset_can_be_built_with_plugins_and_inlined(preset: str) -> None:
    config = load_preset(preset).config
    assert refusals(config, plugins=WITH_KERNELS, ops=WITH_KERNELS) == []
    assert refusals(config, plugins=(), ops=WITH_KERNELS) == []
    assert export_warnings(config, ops=WITH_KERNELS, parallelism=Parallelism()) == []


@pytest.mark.parametrize(
    ("values", "sentences"),
    [
        (
            {"num_experts_per_tok": 22},
            [
                "MoeRoute: num_experts_per_tok is 22, kernels take 1 to 16",
                "MoeExperts: num_experts_per_tok is 22, kernels take 1 to 16",
            ],
        ),
        ({"index_n_heads": 48}, ["DsaIndexer: index_n_heads is 48, kernels take 16, 32 or 64"]),
        (
            {"kv_lora_rank": 384},
            [
                "DsaCacheWrite: kv_lora_rank is 384, kernels take 128, 256, 512 or 1024",
                "DsaAttention: kv_lora_rank is 384, kernels take 128, 256 or 512",
                "MlaCacheWrite: kv_lora_rank is 384, kernels take 128, 256, 512 or 1024",
                "MlaAttention: kv_lora_rank is 384, kernels take 128, 256 or 512",
            ],
        ),
        (
            {"n_routed_experts": 160},
            ["MoeRoute: n_routed_experts is 160, kernels take a power of two from 16 to 1024"],
        ),
        ({"n_group": 1, "topk_group": 1, "n_routed_experts": 256}, []),
    ],
)
def test_plugins_refuse_what_their_kernels_refuse(values: dict[str, int], sentences: list[str]) -> None:
    config = changed(**values)
    assert refusals(config, plugins=WITH_KERNELS, ops=WITH_KERNELS) == sentences
    assert refusals(config, plugins=(), ops=WITH_KERNELS) == [], "the same operators can be inlined"
    for op, bound in operators(config).items():
        if any(sentence.startswith(op + ":") for sentence in sentences):
            with pytest.raises(ShapeError):
                statics_of(op, bound)
        else:
            statics_of(op, bound)


@pytest.mark.parametrize("preset", ["tiny-v3", "v3-full"])
def test_a_model_without_an_indexer_is_built_with_plugins_over_caches_in_bf16(preset: str) -> None:
    config = load_preset(preset).config
    ops = [op for op in WITH_KERNELS if not op.startswith("Dsa")]
    assert refusals(config, plugins=ops, ops=ops, kv_format="bf16") == []
    assert export_warnings(config, ops=ops, parallelism=Parallelism(), kv_format="bf16") == []
    refused = [one.partition(":")[0] for one in refusals(config, plugins=ops, ops=ops, kv_format="fp8_ds")]
    assert refused == ["MlaCacheWrite", "MlaAttention"]


def test_the_inlined_indexer_is_refused_above_what_tensorrt_selects() -> None:
    sentence = "DsaIndexer: index_topk is 3841, TensorRT's TopK takes at most 3840 where it is inlined"
    assert refusals(changed(index_topk=3841), plugins=(), ops=WITH_KERNELS) == [sentence]
    assert refusals(changed(index_topk=3841), plugins=["DsaIndexer"], ops=WITH_KERNELS) == []
    assert refusals(changed(index_topk=3840), plugins=(), ops=WITH_KERNELS) == []
    assert refusals(changed(index_topk=3841), plugins=(), ops=["MoeRoute"]) == [], "not an operator of the program"


def test_an_export_says_what_gpu_targets_will_do_without_kernels() -> None:
    assert export_warnings(changed(num_experts_per_tok=22), ops=WITH_KERNELS, parallelism=Parallelism()) == [
        "MoeRoute: num_experts_per_tok is 22, kernels take 1 to 16: GPU targets inline it",
        "MoeExperts: num_experts_per_tok is 22, kernels take 1 to 16: GPU targets inline it, "
        "which needs --precision bf16",
    ]
    (both,) = export_warnings(changed(index_n_heads=8, index_topk=5000), ops=WITH_KERNELS, parallelism=Parallelism())
    assert both.endswith(
        "it cannot be inlined either (DsaIndexer: index_topk is 5000, TensorRT's TopK takes at most 3840 where it is "
        "inlined): no GPU target builds it"
    )
    (alone,) = export_warnings(changed(index_n_heads=8), ops=WITH_KERNELS, parallelism=Parallelism())
    assert alone.endswith("which needs --kv-cache-dtype bf16")


def test_sizes_are_those_of_one_rank() -> None:
    dealt = Parallelism(tp=4, ep=True)
    sizes = operators(V32, parallelism=dealt)
    assert (sizes["DsaAttention"]["H"], sizes["MoeExperts"]["E"], sizes["MoeExperts"]["I2"]) == (32, 64, 4096)
    cut = operators(V32, parallelism=Parallelism(tp=4))["MoeExperts"]
    assert (cut["E"], cut["I2"]) == (256, 1024)
    assert sizes["MoeRoute"]["E"] == 256, "every rank routes among all experts"
    many = changed(n_routed_experts=2048)
    warned = [w.partition(":")[0] for w in export_warnings(many, ops=WITH_KERNELS, parallelism=Parallelism())]
    assert warned == ["MoeRoute", "MoeExperts"]
    assert [w.partition(":")[0] for w in export_warnings(many, ops=WITH_KERNELS, parallelism=dealt)] == ["MoeRoute"]


def test_what_no_target_computes_is_refused_at_export_and_the_rest_is_said(tmp_path: Path) -> None:
    raw = load_preset("tiny").config_json
    with pytest.raises(ConfigError, match=r"moe_intermediate_size is 200, expected a multiple of 128 \(FP8 block\)"):
        ModelConfig.parse(raw | {"moe_intermediate_size": 200}, "config.json")
    raw = raw | {"num_experts_per_tok": 22, "n_routed_experts": 64, "num_hidden_layers": 2}
    raw |= {"num_nextn_predict_layers": 0}
    new_checkpoint(tmp_path / "checkpoint", Preset("wide", 1, raw, ModelConfig.parse(raw, "wide")))
    found = CliRunner().invoke(export_command, [str(tmp_path / "checkpoint"), str(tmp_path / "program"), "--quiet"])
    assert found.exit_code == 0
    assert "warning: MoeRoute: num_experts_per_tok is 22, kernels take 1 to 16: GPU targets inline it\n" in found.output
    assert (tmp_path / "program" / "model.onnx").is_file()
    dense = export(tmp_path / "checkpoint", tmp_path / "dense", numerics=NUMERICS["fp8"], layer_range=(0, 1))
    assert dense.warnings == (), "the dense layer has no router"


# --- one source -------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_launch_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {(one.op, one.key, one.expected) for one in limits() if "plugin" in one.forms}
    assert listed == {(op, one.key, one.expected) for op in WITH_KERNELS for one in op_kernels(op).RULES}
    assert ("DsaIndexer", "index_topk", "at most 3840") in {(one.op, one.key, one.expected) for one in limits()}
    module = op_kernels("DsaIndexer")
    stricter = dataclasses.replace(module.RULES[0], accepts=lambda value: value == 16, expected="16")
    monkeypatch.setattr(module, "RULES", (stricter,))
    assert [one.expected for one in limits() if one.key == "index_n_heads"] == ["16"]
    assert refusals(V32, plugins=WITH_KERNELS, ops=WITH_KERNELS) == ["DsaIndexer: index_n_heads is 64, kernels take 16"]


#: Operators whose kernels take a weight of any size: their rules are on what each call has.
WITHOUT_SIZES = (ADD_RMS_NORM_QUANTIZE, BLOCK_FP8_LINEAR, BF16_LINEAR)


def test_every_rule_is_on_a_size_that_its_operator_has() -> None:
    for op, bound in operators(V32).items():
        for one in op_kernels(op).RULES:
            assert one.symbol in bound or op in WITHOUT_SIZES, (op, one)
            assert one.symbol not in bound or one.accepts(bound[one.symbol] // one.factor)


@pytest.mark.parametrize(
    ("one", "good", "bad", "words"),
    [
        (rule("a", "A", one_of(1, 2, 4)), [1, 2, 4], [0, 3, 8], "a 1, 2 or 4"),
        (rule("a", "A", between(1, 16)), [1, 16], [0, 17], "a 1 to 16"),
        (rule("a", "A", exactly(128, "one block")), [128], [0, 64, 256], "a 128 (one block)"),
        (rule("a", "A", multiple(128, "one block")), [0, 128, 384], [1, 127, 129], "a a multiple of 128 (one block)"),
        (rule("a", "A", power_of_two(2, 8)), [2, 4, 8], [0, 1, 3, 6, 16], "a a power of two from 2 to 8"),
    ],
)
def test_conditions(one: Rule, good: list[int], bad: list[int], words: str) -> None:
    assert str(one) == words
    for value in good:
        check_rules("Op", [one], {"A": value})
    for value in bad:
        with pytest.raises(ShapeError, match=f"Op: a is {value}, kernels take"):
            check_rules("Op", [one], {"A": value})
    check_rules("Op", [one], {"B": bad[0]})
