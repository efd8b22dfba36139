"""What `seekforge.plan` answers for models of either family."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Literal

import pytest

from seekforge.common.errors import ConfigError, TargetError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.planner.api import plan


@pytest.fixture
def deepseek_v3(tmp_path: Path) -> Path:
    """The released config.json of DeepSeek-V3: that of V3.2 without an indexer and without `scale_fmt`."""
    raw = {key: value for key, value in load_preset("full").config_json.items() if not key.startswith("index_")}
    quantization = {key: value for key, value in raw["quantization_config"].items() if key != "scale_fmt"}
    raw |= {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "quantization_config": quantization,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def test_deepseek_v3_has_the_sizes_of_its_release(deepseek_v3: Path) -> None:
    """Spec §17.1: 671 billion parameters of which a token meets 37, and 576 cached values per token and layer."""
    result = plan(deepseek_v3, target="h200", contexts=(1024, 163840), precision="fp8")
    assert result.model.parameters == 671_026_419_200
    assert 37e9 < result.model.active_parameters < 38e9
    assert result.model.checkpoint_bytes == 688_574_839_360
    assert result.kv_cache_dtype == "bf16"
    assert result.model.cache_bytes_per_token == 61 * 576 * 2
    for row in result.answers:
        assert row.found is not None
        assert row.found.memory.indexer_scores == 0
        assert row.found.memory.scratch < 163840 * 576 * 4, "no kernel gathers a context in f32"


def test_a_cache_that_no_kernel_of_a_family_reads_is_refused(deepseek_v3: Path) -> None:
    with pytest.raises(
        ConfigError, match="deepseek_v3 model are bf16 on GPUs, --kv-cache-dtype is fp8_ds; leave it out"
    ):
        plan(deepseek_v3, kv_cache_dtype="fp8_ds")


def test_a_family_with_kernels_caches_fp8_unless_told_otherwise() -> None:
    assert plan("tiny", target="h200", contexts=1024).kv_cache_dtype == "fp8_ds"
    assert plan("tiny", target="h200", contexts=1024, kv_cache_dtype="bf16").kv_cache_dtype == "bf16"


def test_experts_in_nvfp4_take_fewer_gpus_and_decode_faster() -> None:
    result = plan("full", target="b200", contexts=32768, batch_size=32, precision=("fp8", "nvfp4"), num_gpus=8)
    fp8, nvfp4 = (row.found for row in result.answers)
    assert fp8 is not None and nvfp4 is not None
    experts = 58 * 256 * 3 * 2048 * 7168
    assert result.model.weight_bytes["fp8"] - result.model.weight_bytes["nvfp4"] == experts * 7 // 16
    assert fp8.memory.weights - nvfp4.memory.weights == experts * 7 // 16 // 8
    assert fp8.speed.decode_tokens_per_s < nvfp4.speed.decode_tokens_per_s, "which weights bound"
    assert nvfp4.speed.prefill_tokens_per_s < fp8.speed.prefill_tokens_per_s, "experts multiply in BF16"


def test_experts_in_nvfp4_are_for_gpus_that_have_kernels_of_them() -> None:
    assert {row.target.sm for row in plan("full", contexts=1024, precision="nvfp4").answers} == {100, 103, 120, 121}
    with pytest.raises(TargetError, match="target h200 is of sm 90, precision nvfp4 is for SMs from 100 on"):
        plan("full", target=("b200", "h200"), precision="nvfp4")


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_a_forecast_counts_what_nvfp4_reads(goal: Literal["latency", "throughput"]) -> None:
    asked = {"target": "b200", "contexts": 8192, "batch_size": 32, "num_gpus": 8, "goal": goal}
    fp8, nvfp4 = plan("full", precision=("fp8", "nvfp4"), **asked).rankings
    assert nvfp4[0].forecast.kernels < fp8[0].forecast.kernels
    assert nvfp4[0].forecast.launches > fp8[0].forecast.launches, "the shared expert, in FP8, is apart"


@pytest.mark.parametrize("preset", ["full", "v3-full", "glm5-full"])
def test_every_family_is_planned_up_to_its_longest_context(preset: str) -> None:
    """Each context has a layout that fits it; a longer one takes more cache, over all layers, and holds no more."""
    contexts = (1024, 125 * 1024, load_preset(preset).config.max_position_embeddings)
    rows = [row.found for row in plan(preset, target="b200", contexts=contexts, precision="fp8").answers]
    assert len(rows) == len(contexts)
    for context, found in zip(contexts, rows):
        assert found is not None and found.max_context >= context
    for short, long in itertools.pairwise(rows):
        assert short is not None and long is not None
        assert short.memory.cache * short.parallelism.pp < long.memory.cache * long.parallelism.pp
        assert short.max_batch >= long.max_batch
