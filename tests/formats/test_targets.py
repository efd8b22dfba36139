"""Target files: the schema, changes by --set, and what is said when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.common.errors import TargetError
from seekforge.exporter.builder.targets_cli import markdown_tables
from seekforge.formats.targets import all_targets, limits_named, load_target

NAMES = {
    "cpu", "ort-cuda", "a100-80g", "l40s", "rtx4090", "rtx5090", "rtx-pro-6000", "dgx-spark",
    "h20", "h100", "h200", "gh200", "b200", "b300",
}  # fmt: skip


def test_every_target_is_valid_and_named_like_its_file() -> None:
    assert {target.name for target in all_targets()} == NAMES
    for target in all_targets():
        assert load_target(target.name) == target


def test_rates_go_together() -> None:
    for target in all_targets():
        if target.gpu is not None:
            assert target.gpu.fp8_tflops is None or target.gpu.fp8_tflops == pytest.approx(
                2 * target.gpu.bf16_tflops, rel=0.02
            )
            assert (target.gpu.fp8_tflops is not None) == target.has_fp8


def test_fp8_without_fp8_units_means_weights_only() -> None:
    assert load_target("a100-80g").products == "bf16"
    assert load_target("rtx4090").products == "fp8"
    assert load_target("rtx4090", ["also=[80]"]).products == "bf16"


def test_changes_are_applied_in_order() -> None:
    target = load_target("h100", ["limits.max_batch_size=8", "gpu.memory_gib=94", "limits.max_batch_size=9"])
    assert target.limits.max_batch_size == 9
    assert target.gpu is not None and target.gpu.memory_gib == 94


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("limits.max_batch=3", "unknown key 'limits.max_batch', known: .*did you mean max_batch_size"),
        ("limits.max_batch_size=x", "key 'limits.max_batch_size'"),
        ("limits.max_batch_size", "expected KEY=VALUE"),
        ("foo.bar=1", "'foo' is no group of keys; known: gpu, limits, profiles$"),
        ("profiles.foo.max_batch=3", "'profiles.foo' is no group of keys; known: decode, prefill"),
        ("profiles.decode.max_batch=3", "unknown key 'profiles.decode.max_batch', known: max_batch_size"),
        (
            "limits.max_batch_size.x=3",
            "'limits.max_batch_size' is no group of keys; pass --set limits.max_batch_size=V",
        ),
        ("sm=91", "sm 91 is not one that tensorrt compiles for"),
        ("also=[89]", "also is for tensorrt-rtx"),
        ("precision=f32", "a GPU target computes in bf16"),
        ("gpu=null", "sm, gpu and profiles are needed"),
        ("gpu.bf16_tflops=-1", "key 'gpu.bf16_tflops'"),
        ("gpu.memory_gib=.inf", "key 'gpu.memory_gib': .*finite"),
        ("gpu.fp8_tflops=.nan", "key 'gpu.fp8_tflops': .*finite"),
        ("gpu.memory_gib=1e300", "key 'gpu.memory_gib': .*at most 1e"),
        ("limits.max_model_len=.inf", "key 'limits.max_model_len'"),
        ("profiles.decode.max_batch_size=.inf", "key 'profiles.decode.max_batch_size': .*finite"),
    ],
)
def test_a_wrong_change_is_named(setting: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load_target("h100", [setting])


def test_what_a_user_asks_for_is_told_from_defaults() -> None:
    assert limits_named(["limits.max_batch_size=3", "gpu.memory_gib=3", "precision=bf16"]) == {"max_batch_size"}
    everything = "limits={max_model_len: 1, max_batch_size: 1, max_num_batched_tokens: 1}"
    assert limits_named([everything]) == {"max_model_len", "max_batch_size", "max_num_batched_tokens"}
    assert limits_named([]) == frozenset()


def test_the_formats_of_a_target_in_words() -> None:
    assert load_target("a100-80g").formats == "FP8 weights, BF16 products"
    assert load_target("h100").formats == "FP8 weights, FP8 products"
    assert load_target("cpu", ["precision=int8"]).formats == "int8 weights in blocks of 32"
    mixed = load_target("cpu", ["lm_head=int8", "weight_block_size=64"])
    assert mixed.formats == "f32 weights (lm_head int8) in blocks of 64"
    assert load_target("cpu").formats == load_target("ort-cuda").formats == "f32 weights"


def test_a_precision_for_weights_that_a_pattern_names() -> None:
    target = load_target("cpu", ["model.layers.0.*=int8", 'lm_head="f32"', "precision=int4", "lm_head=int4"])
    assert target.precision == "int4"
    assert target.weights == {"model.layers.0.*": "int8", "lm_head": "int4"}
    assert load_target("cpu", ["weights={experts: int4}"]).weights == {"experts": "int4"}
    with pytest.raises(TargetError, match=r"key 'weights\.experts'.*int3"):
        load_target("cpu", ["weights={experts: int3}"])
    with pytest.raises(TargetError, match="weights and weight_block_size are for CPUs"):
        load_target("h100", ["lm_head=int8"])
    with pytest.raises(TargetError, match=r"key 'weight_block_size': .*48"):
        load_target("cpu", ["weight_block_size=48"])


def test_a_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbackend: onnxruntime\nsm: null\nactivations: f32\nprecision: f32\nkv_format: f32\n")
    with pytest.raises(TargetError, match=r"mine\.yaml: key 'limits'"):
        load_target(str(path))
    settings = ["limits={max_model_len: 1, max_batch_size: 1, max_num_batched_tokens: 1}"]
    assert load_target(str(path), settings).name == "mine"
    with pytest.raises(TargetError, match="cannot be read"):
        load_target(str(tmp_path / "none.yaml"))
    path.write_text("name: mine\nsm: .nan\n")
    with pytest.raises(TargetError, match=r"mine\.yaml: line 2 is '\.nan', expected a finite number"):
        load_target(str(path))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'h1000'.*did you mean h100\?"):
        load_target("h1000")


def test_the_documented_tables_are_those_of_the_targets() -> None:
    document = Path(__file__).parents[2] / "docs" / "targets.md"
    assert markdown_tables(all_targets()) in document.read_text(encoding="utf-8"), (
        "docs/targets.md is out of date: paste the output of 'seekforge targets --markdown'"
    )
