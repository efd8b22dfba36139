"""Sizes and FLOPs against published and derived numbers (spec §2.4, §7.3, §9)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from seekforge.exporter.sizing.flops import (
    attention_flops,
    dense_attention_flops,
    linear_flops,
    prefill_attention_flops,
)
from seekforge.exporter.sizing.matrices import (
    active_parameters,
    checkpoint_bytes,
    end_matrices,
    held_bytes,
    layer_matrices,
    num_parameters,
    weight_bytes,
)
from seekforge.exporter.sizing.memory import (
    GIB,
    Workload,
    cache_bytes,
    cache_bytes_per_token,
    rank_memory,
    usable_bytes,
)
from seekforge.exporter.sizing.stages import stages
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism

MODELS = Path(__file__).parents[3] / "configs" / "models"


@pytest.fixture(scope="module")
def full() -> ModelConfig:
    return ModelConfig.parse(yaml.safe_load((MODELS / "full.yaml").read_text(encoding="utf-8"))["config"], "full")


def test_parameters(full: ModelConfig) -> None:
    assert num_parameters(full) == 671_877_944_064
    assert num_parameters(full, mtp=True) - num_parameters(full) == 11_624_027_648
    assert active_parameters(full) == pytest.approx(38.40e9, rel=1e-4)


def test_checkpoint_bytes(full: ModelConfig) -> None:
    assert checkpoint_bytes(full) == 689_469_018_240
    assert checkpoint_bytes(full) / GIB == pytest.approx(642.1, abs=0.05)


@pytest.mark.parametrize(("layer", "expected"), [(0, 598_064_576), (3, 11_526_369_728)])
def test_layer_bytes(full: ModelConfig, layer: int, expected: int) -> None:
    assert sum(matrix.num_bytes() for matrix in layer_matrices(full, layer)) == expected


def test_engine_weights_hold_kv_b_in_bf16_and_norms_in_f32(full: ModelConfig) -> None:
    kv_b = 128 * 256 * 512
    scales = 4 * 256 * 4
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    assert weight_bytes(full) == 674_030_368_448 + 61 * (kv_b - scales) + 2 * norms
    experts = 58 * 256 * 3 * 2048 * 7168  # 4.5 bits instead of 8
    assert weight_bytes(full) - weight_bytes(full, precision="nvfp4") == experts * 7 // 16
    assert weight_bytes(full, precision="bf16") == pytest.approx(2 * 671.88e9 + 2 * norms, rel=1e-3)


def test_a_product_with_f32_results_reads_two_bytes_a_weight(full: ModelConfig) -> None:
    """The head in f32 would be 1.85 GB more in every decode step, routers and head weights 0.27 GB."""
    held = {one.name: held_bytes(one, "fp8") for one in (*layer_matrices(full, 3), *end_matrices(full)[1])}
    assert held["lm_head"] == 1_853_358_080 == 2 * 129_280 * 7168
    assert (held["mlp.gate"], held["self_attn.indexer.weights_proj"]) == (2 * 256 * 7168, 2 * 64 * 7168)


@pytest.mark.parametrize(
    ("kv_format", "layers", "per_token"),
    [("fp8_ds", 61, 48_068), ("fp8_ds", 62, 48_856), ("fp8_ds", 1, 788), ("bf16", 1, 1408), ("f32", 1, 2816)],
)
def test_cache_bytes_per_token(full: ModelConfig, kv_format, layers: int, per_token: int) -> None:
    assert cache_bytes_per_token(full, kv_format, layers=range(layers)) == per_token


@pytest.mark.parametrize(("context", "layers", "gib"), [(131072, 61, 5.868), (131072, 62, 5.964), (163840, 61, 7.335)])
def test_cache_of_one_long_sequence(full: ModelConfig, context: int, layers: int, gib: float) -> None:
    scrap = 64 * 788 * layers
    found = cache_bytes(full, "fp8_ds", context=context, batch=1, layers=range(layers)) - scrap
    assert found / GIB == pytest.approx(gib, abs=0.0006)


def test_linear_flops(full: ModelConfig) -> None:
    indexer = [m for layer in range(61) for m in layer_matrices(full, layer) if ".indexer." in m.name]
    projections = linear_flops(full, indexer).total
    assert projections == pytest.approx(1.70e9, rel=2e-3)
    assert linear_flops(full).total - projections == pytest.approx(73.25e9, rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "mha", "mqa", "core", "indexer", "total"),
    [
        (2048, 10.2, 34.8, 34.8, 2.0, 36.8),
        (4096, 20.5, 69.6, 34.8, 4.1, 38.9),
        (8192, 40.9, 139.2, 34.8, 8.2, 43.0),
        (32768, 163.7, 556.7, 34.8, 32.7, 67.5),
        (65536, 327.5, 1113, 34.8, 65.5, 100.3),
        (131072, 655.0, 2227, 34.8, 131.0, 165.8),
    ],
)
def test_attention_flops(
    full: ModelConfig, keys: int, mha: float, mqa: float, core: float, indexer: float, total: float
) -> None:
    found = attention_flops(full, keys)
    assert found.bf16 / 1e9 == pytest.approx(core, abs=0.06)
    assert found.fp8 / 1e9 == pytest.approx(indexer, abs=0.06)
    assert found.total / 1e9 == pytest.approx(total, abs=0.06)
    assert dense_attention_flops(full, keys, absorbed=False) / 1e9 == pytest.approx(mha, rel=2e-3, abs=0.06)
    assert dense_attention_flops(full, keys, absorbed=True) / 1e9 == pytest.approx(mqa, rel=1e-3, abs=0.06)


@pytest.mark.parametrize(("prompt", "tflop"), [(8192, 283), (32768, 1641), (131072, 13110)])
def test_prefill_flops(full: ModelConfig, prompt: int, tflop: float) -> None:
    assert prefill_attention_flops(full, prompt).total / 1e12 == pytest.approx(tflop, rel=2e-3)


def fits(config: ModelConfig, layout: Parallelism, memory_gib: float, context: int = 1024) -> bool:
    memory = rank_memory(config, layout, Workload(context), precision="fp8", kv_format="fp8_ds", mtp=False)
    return memory.total <= usable_bytes(memory_gib)


def test_eight_h100_are_too_small_and_eight_h200_are_enough(full: ModelConfig) -> None:
    h100, h200 = 79.6, 140.4
    for layout in (Parallelism(tp=8), Parallelism(pp=8), Parallelism(tp=4, pp=2)):
        assert not fits(full, layout, h100)
        assert fits(full, layout, h200)
        assert fits(full, layout, h200, context=131072)
    assert fits(full, Parallelism(tp=8, pp=2), h100, context=131072)


def test_stages_hold_every_layer_once(full: ModelConfig) -> None:
    for pp in (1, 2, 7, 8, 61):
        cut = stages(full, Parallelism(pp=pp), "fp8", mtp=True)
        assert [layer for layers, _ in cut for layer in layers] == list(range(61))
        assert len(cut) == pp
        assert sum(size for _, size in cut) >= weight_bytes(full, mtp=True)


def test_tensor_parallel_ranks_add_up(full: ModelConfig) -> None:
    """What is divided adds up to the whole, and what is not is on every rank."""
    one, eight = (stages(full, Parallelism(tp=n), "fp8", mtp=False)[0][1] for n in (1, 8))
    assert one == weight_bytes(full)
    replicated = (8 * eight - one) / 7
    assert 0 < replicated < 0.02 * one


def test_memory_grows_with_the_context_but_scratch_is_bounded(full: ModelConfig) -> None:
    small, large = (
        rank_memory(full, Parallelism(tp=8), Workload(n), precision="fp8", kv_format="fp8_ds", mtp=False)
        for n in (8192, 131072)
    )
    assert small.weights == large.weights
    assert large.cache > small.cache
    assert large.scratch < GIB
