"""What `seekforge.plan` answers for models of either family."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from seekforge.common.errors import ConfigError
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
