"""The memory calculator: which GPUs and how many, bounds, and what the command prints."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from seekforge.exporter.build.targets import load_target
from seekforge.exporter.plan.answer import (
    Question,
    answer,
    best,
    cache_read_bytes,
    experts_hit,
    fewest,
    layouts,
    speed,
)
from seekforge.exporter.plan.cli import parse_tokens, plan
from seekforge.plugins.charts import tokens
from seekforge.plugins.errors import ConfigError, OutputError, SeekforgeError, TargetError
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.sizing import Layout, Workload, rank_memory, usable_bytes

MODELS = Path(__file__).parents[3] / "configs" / "models"
FP8 = Question("fp8", "fp8_ds")


@pytest.fixture(scope="module")
def full() -> ModelConfig:
    return ModelConfig.parse(yaml.safe_load((MODELS / "full.yaml").read_text(encoding="utf-8"))["config"], "full")


def invoke(*args: str) -> Result:
    result = CliRunner().invoke(plan, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "precision", "num_gpus"),
    [
        ("h100", "fp8", 16),
        ("h200", "fp8", 8),
        ("b200", "fp8", 4),
        ("b300", "fp8", 4),
        ("a100-80g", "fp8", 16),
        ("h200", "bf16", 16),
    ],
)
@pytest.mark.parametrize("context", [1024, 63 * 1024, 125 * 1024])
def test_how_many_gpus(full: ModelConfig, target: str, precision, num_gpus: int, context: int) -> None:
    found = fewest(full, load_target(target), Workload(context), Question(precision, "fp8_ds"))
    assert found is not None and found.fits
    assert found.layout.num_gpus == num_gpus


def test_the_largest_numbers_fit_and_the_next_do_not(full: ModelConfig) -> None:
    h200 = load_target("h200")
    work = Workload(32768, 4)
    found = answer(full, h200, Layout(tp=8), work, FP8)
    for context, batch, fits in (
        (32768, found.max_batch, True),
        (32768, found.max_batch + 1, False),
        (found.max_context, 4, True),
    ):
        memory = rank_memory(
            full, Layout(tp=8), Workload(context, batch), precision="fp8", kv_format="fp8_ds", mtp=False
        )
        assert (memory.total <= usable_bytes(140.4)) is fits


def test_what_does_not_fit_is_answered_with_what_is_over(full: ModelConfig) -> None:
    found = best(full, load_target("h100"), 8, Workload(1024), FP8)
    assert found is not None and not found.fits
    assert found.memory.weights > found.usable


def test_layouts_use_every_gpu_once(full: ModelConfig) -> None:
    for count in (1, 2, 8, 24, 128):
        for layout in layouts(count, full):
            assert layout.num_gpus == count
            assert layout.tp <= 8


def test_more_experts_are_read_by_more_tokens() -> None:
    assert experts_hit(256, 8, 1) == pytest.approx(8)
    assert experts_hit(256, 8, 32) == pytest.approx(163, abs=0.5)
    assert experts_hit(256, 8, 10_000) == pytest.approx(256)


def test_cache_reads(full: ModelConfig) -> None:
    """Spec §9.2: 132·L + 2048·656 bytes per layer; a context within index_topk needs no scores."""
    assert cache_read_bytes(full, "fp8_ds", 131072) == 132 * 131072 + 2048 * 656
    assert cache_read_bytes(full, "fp8_ds", 1000) == 1000 * 656


def test_decode_is_bounded_by_what_it_reads(full: ModelConfig) -> None:
    """One token on one imaginary H200 with room: active weights over the bandwidth, to within the rest."""
    h200 = load_target("h200")
    found = speed(full, h200, Layout(), Workload(1024), FP8)
    assert found.decode_bound == "memory"
    wide = 129_280 * 7168 + 58 * 256 * 7168 + 61 * 64 * 7168  # head, routers and the indexers' head weights in f32
    active = 37.5e9 + 61 * 128 * 256 * 512 + 3 * wide  # else one byte each; kv_b in BF16
    assert 4.8e12 / found.decode_tokens_per_s == pytest.approx(active, rel=0.02)
    large = speed(full, h200, Layout(), Workload(1024, 4096), FP8)
    assert large.decode_bound == "compute"
    assert large.decode_tokens_per_s > found.decode_tokens_per_s


def test_prefill_is_bounded_by_its_flops(full: ModelConfig) -> None:
    h200 = load_target("h200")
    found = speed(full, h200, Layout(), Workload(32768), FP8)
    least = (1641e12 + 32768 * 74.9e9) / 1979e12
    assert found.prefill_s > least
    assert found.prefill_s < 2 * least


def test_ampere_multiplies_in_bf16(full: ModelConfig) -> None:
    a100 = load_target("a100-80g")
    fp8, bf16 = (
        speed(full, a100, Layout(tp=8, pp=2), Workload(8192, 512), Question(p, "fp8_ds")) for p in ("fp8", "bf16")
    )
    assert fp8.prefill_s == pytest.approx(bf16.prefill_s, rel=0.01), "the same products, other bytes"
    assert fp8.decode_tokens_per_s > bf16.decode_tokens_per_s


# --- command ------------------------------------------------------------------------------------------------


def test_the_full_model_is_answered_in_json() -> None:
    said = json.loads(invoke("full", "--target", "h200", "--context", "1K,63K,125K", "--json").stdout)
    assert said["model"]["cache_bytes_per_token"] == 48_068
    assert said["model"]["checkpoint_bytes"] == 689_469_018_240
    assert {(a["precision"], a["context"]) for a in said["answers"]} == {
        (p, c * 1024) for p in ("fp8", "bf16") for c in (1, 63, 125)
    }
    assert all(a["fits"] for a in said["answers"])


def test_the_table_and_the_chart(tmp_path: Path) -> None:
    chart = tmp_path / "memory.svg"
    args = ("full", "--target", "h100", "--target", "h200", "--precision", "fp8", "--chart", str(chart))
    text = invoke(*args).stdout
    assert "weights in FP8, batch 1" in text
    assert "48,068 B per token" in text
    drawn = {element.text for element in ElementTree.fromstring(chart.read_text(encoding="utf-8")).iter()}
    assert "GiB on the fullest GPU" in drawn and "128K" in drawn
    assert any(text and text.startswith("8 × h200") for text in drawn)
    assert any(text and text.startswith("h100: ") for text in drawn), "the memory of the GPU is a line"


def test_a_checkpoint_needs_its_config_alone(tmp_path: Path) -> None:
    raw = yaml.safe_load((MODELS / "tiny.yaml").read_text(encoding="utf-8"))["config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    said = json.loads(invoke(str(tmp_path), "--target", "rtx4090", "--context", "1K", "--mtp", "--json").stdout)
    assert said["answers"][0]["num_gpus"] == 1


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (("nothing",), ConfigError, "neither a folder, nor a config.json, nor a name"),
        (("full", "--context", "200K"), ConfigError, r"the model ends at 163840 tokens \(160K"),
        (("full", "--context", "many"), ConfigError, "expected tokens such as"),
        (("full", "--target", "cpu"), TargetError, "is no GPU"),
        (("full", "--tp", "3"), ConfigError, "TP3 does not divide num_attention_heads 128"),
        (("full", "--tp", "8", "--num-gpus", "4"), ConfigError, "TP8 is 8 GPUs, --num-gpus says 4"),
        (("full", "--target", "h200", "--context", "1K", "--chart", "x.bmp"), OutputError, r"ends in \.png or \.svg"),
    ],
)
def test_wrong_questions(args: tuple[str, ...], kind: type[SeekforgeError], message: str) -> None:
    with pytest.raises(kind, match=message):
        invoke(*args)


# --- pure parts ---------------------------------------------------------------------------------------------


def test_tokens_are_read_and_written(full: ModelConfig) -> None:
    assert parse_tokens("63K", full) == 64512
    assert parse_tokens(" 100 ", full) == 100
    assert tokens(131072) == "128K"
    assert tokens(100) == "100"
