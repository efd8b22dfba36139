"""The memory calculator: which GPUs and how many, bounds, and what the command prints."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from seekforge.common.cli.charts import tokens
from seekforge.common.errors import ConfigError, OutputError, TargetError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models.sharding import check_parallelism
from seekforge.exporter.planner.answer import answer, best, fewest, layouts
from seekforge.exporter.planner.cli import plan
from seekforge.exporter.planner.question import Question
from seekforge.exporter.planner.speed import cache_read_bytes, speed
from seekforge.exporter.program.cli import export
from seekforge.exporter.sizing.flops import indexer_flops, linear_flops, prefill_attention_flops
from seekforge.exporter.sizing.matrices import held_bytes, layer_matrices
from seekforge.exporter.sizing.memory import Workload, operator_scratch_bytes, rank_memory, scratch_bytes, usable_bytes
from seekforge.exporter.sizing.stages import rank_weight_bytes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import load_target
from seekforge.plugins.cost.work import experts_hit

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
    assert found.parallelism.num_gpus == num_gpus


def test_the_largest_numbers_fit_and_the_next_do_not(full: ModelConfig) -> None:
    h200 = load_target("h200")
    work = Workload(32768, 4)
    found = answer(full, h200, Parallelism(tp=8), work, FP8)
    for context, batch, fits in (
        (32768, found.max_batch, True),
        (32768, found.max_batch + 1, False),
        (found.max_context, 4, True),
    ):
        memory = rank_memory(
            full, Parallelism(tp=8), Workload(context, batch), precision="fp8", kv_format="fp8_ds", mtp=False
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
    assert cache_read_bytes(full, "fp8_ds", 131072, [0]) == 132 * 131072 + 2048 * 656
    assert cache_read_bytes(full, "fp8_ds", 1000, [0]) == 1000 * 656


def test_decode_is_bounded_by_what_it_reads(full: ModelConfig) -> None:
    """One token on one imaginary H200 with room: active weights over the bandwidth, to within the rest."""
    h200 = load_target("h200")
    found = speed(full, h200, Parallelism(), Workload(1024), FP8)
    assert found.decode_bound == "memory"
    two = 129_280 * 7168 + 58 * 256 * 7168 + 61 * (64 * 7168 + 128 * 256 * 512)  # head, routers, head weights, kv_b
    active = 37.5e9 + two  # else one byte each
    assert 4.8e12 / found.decode_tokens_per_s == pytest.approx(active, rel=0.01), "f32 routers and head: 6 % more"
    large = speed(full, h200, Parallelism(), Workload(1024, 4096), FP8)
    assert large.decode_bound == "compute"
    assert large.decode_tokens_per_s > found.decode_tokens_per_s


def test_prefill_is_bounded_by_its_flops(full: ModelConfig) -> None:
    h200 = load_target("h200")
    found = speed(full, h200, Parallelism(), Workload(32768), FP8)
    head = 2 * 129_280 * 7168
    least = (1641e12 + 32768 * (74.9e9 - head)) / 1979e12
    assert found.prefill_s > least
    assert found.prefill_s < 2 * least


def test_ampere_multiplies_in_bf16(full: ModelConfig) -> None:
    a100 = load_target("a100-80g")
    fp8, bf16 = (
        speed(full, a100, Parallelism(tp=8, pp=2), Workload(8192, 512), Question(p, "fp8_ds")) for p in ("fp8", "bf16")
    )
    assert fp8.prefill_tokens_per_s == pytest.approx(bf16.prefill_tokens_per_s, rel=0.01), "the same products"
    assert fp8.decode_tokens_per_s > bf16.decode_tokens_per_s


@pytest.mark.parametrize("layout", [Parallelism(tp=8), Parallelism(tp=4, dp=2), Parallelism(tp=2, pp=4)])
@pytest.mark.parametrize("context", [1024, 63 * 1024])
def test_accepted_drafts_make_decoding_faster(full: ModelConfig, layout: Parallelism, context: int) -> None:
    """Where memory bounds it: two tokens per step, for more experts, the MTP module's weights and the head again."""
    h200 = load_target("h200")
    without = speed(full, h200, layout, Workload(context, 8), FP8)
    with_mtp = speed(full, h200, layout, Workload(context, 8, draft_tokens=1), Question("fp8", "fp8_ds", mtp=True))
    assert without.decode_bound == with_mtp.decode_bound == "memory"
    assert without.decode_tokens_per_s <= with_mtp.decode_tokens_per_s < 2 * without.decode_tokens_per_s


def test_the_mtp_module_and_its_head_are_charged(full: ModelConfig) -> None:
    """One sequence: what a step with a draft reads more is two tokens' experts, the module, the head and its cache."""
    h200, layout = load_target("h200"), Parallelism(tp=8)
    steps = [
        speed(full, h200, layout, Workload(8192, draft_tokens=1), Question("fp8", "fp8_ds", mtp=mtp)).decode_step_ms
        for mtp in (False, True)
    ]
    matrices = layer_matrices(full, 61)
    module = sum(rank_weight_bytes(m, layout, "fp8") for m in matrices if m.sharding != "experts")
    experts = sum(rank_weight_bytes(m, layout, "fp8") for m in matrices if m.sharding == "experts")
    head = 129_280 * 7168 * 2 // 8
    more = module + experts * experts_hit(256, 8, 2) / 256 + head + cache_read_bytes(full, "fp8_ds", 8192, [0])
    assert (steps[1] - steps[0]) * 1e-3 * 4.8e12 == pytest.approx(more, rel=1e-6)


def test_one_sequence_goes_through_all_stages(full: ModelConfig) -> None:
    found = speed(full, load_target("h200"), Parallelism(tp=2, pp=4), Workload(1024), FP8)
    assert found.decode_tokens_per_s == pytest.approx(1e3 / found.decode_step_ms)


@pytest.mark.parametrize("batch", [16, 64])
def test_stages_are_not_fast_by_reading_weights_once_for_all(full: ModelConfig, batch: int) -> None:
    """Groups of sequences that keep all stages busy each read the weights; tensor ranks read them once for all."""
    h200 = load_target("h200")
    staged, tensor = (
        speed(full, h200, layout, Workload(1024, batch), FP8) for layout in (Parallelism(pp=8), Parallelism(tp=8))
    )
    one = speed(full, h200, Parallelism(pp=8), Workload(1024), FP8)
    assert one.decode_tokens_per_s < staged.decode_tokens_per_s < 0.7 * tensor.decode_tokens_per_s


def test_busy_stages_are_as_fast_as_the_flops_allow(full: ModelConfig) -> None:
    h200 = load_target("h200")
    rates = [speed(full, h200, Parallelism(pp=4), Workload(1024, batch), FP8) for batch in (1, 8, 64, 512, 16384)]
    assert [one.decode_bound for one in rates] == ["memory"] * 4 + ["compute"]
    speeds = [one.decode_tokens_per_s for one in rates]
    assert speeds == sorted(speeds)


def test_replicas_share_nothing(full: ModelConfig) -> None:
    """A sequence on each of two replicas is twice a sequence on one of them."""
    h200 = load_target("h200")
    one, two = (speed(full, h200, Parallelism(tp=8, dp=2), Workload(1024, batch), FP8) for batch in (1, 2))
    assert two.decode_tokens_per_s == pytest.approx(2 * one.decode_tokens_per_s)


@pytest.mark.parametrize("target", ["b200", "h200", "rtx-pro-6000"])
@pytest.mark.parametrize("layout", [Parallelism(tp=8), Parallelism(tp=4, dp=2), Parallelism(tp=2, pp=4)])
def test_shorter_prompts_are_prefilled_no_slower(full: ModelConfig, target: str, layout: Parallelism) -> None:
    chosen = load_target(target)
    rates = [
        speed(
            full, chosen, layout, Workload(context, step_tokens=chosen.limits.max_num_batched_tokens), FP8
        ).prefill_tokens_per_s
        for context in (256, 1024, 1500, 8192, 63 * 1024, 125 * 1024)
    ]
    for short, long in itertools.pairwise(rates):
        assert short >= 0.99 * long, "but for the head, which is read and multiplied once per prompt"


def test_prefill_counts_the_head_once_per_prompt(full: ModelConfig) -> None:
    """A prompt bounded by FLOPs: layers for every token, scores beyond index_topk, and logits of one token."""
    h200 = load_target("h200")
    found = speed(full, h200, Parallelism(), Workload(32768), FP8)
    layers = [matrix for layer in range(61) for matrix in layer_matrices(full, layer)]
    linear, whole = linear_flops(full, layers), prefill_attention_flops(full, 32768)
    unscored = 61 * indexer_flops(full, 2048 * 2049 / 2)
    head = 2 * 129_280 * 7168
    fp8 = 32768 * linear.fp8 + whole.fp8 - unscored
    bf16 = 32768 * linear.bf16 + whole.bf16 + head
    assert h200.gpu is not None and h200.gpu.fp8_tflops is not None
    least = fp8 / (h200.gpu.fp8_tflops * 1e12) + bf16 / (h200.gpu.bf16_tflops * 1e12)
    assert found.prefill_tokens_per_s == pytest.approx(32768 / least, rel=1e-6)


def test_a_lone_prompt_is_no_faster_than_prompts_in_a_row(full: ModelConfig) -> None:
    h200 = load_target("h200")
    for layout in (Parallelism(tp=8), Parallelism(tp=2, pp=4)):
        for context in (1024, 5000, 63 * 1024):
            found = speed(full, h200, layout, Workload(context, step_tokens=4096), FP8)
            assert context / found.prefill_s <= found.prefill_tokens_per_s


# --- command ------------------------------------------------------------------------------------------------


def test_the_full_model_is_answered_in_json() -> None:
    said = json.loads(invoke("full", "--target", "h200", "--contexts", "1K,63K,125K", "--json").stdout)
    assert said["model"]["cache_bytes_per_token"] == 48_068
    assert said["model"]["checkpoint_bytes"] == 689_469_018_240
    assert {(a["precision"], a["context"]) for a in said["answers"]} == {
        (p, c * 1024) for p in ("fp8", "bf16") for c in (1, 63, 125)
    }
    assert all(a["fits"] for a in said["answers"])


def test_the_mtp_module_is_in_what_is_said_of_the_model(full: ModelConfig) -> None:
    args = ("full", "--target", "h200", "--contexts", "1K", "--precision", "fp8")
    plain, mtp = (json.loads(invoke(*args, *more, "--json").stdout)["model"] for more in ((), ("--mtp",)))
    assert mtp["cache_bytes_per_token"] == 48_856
    module = sum(held_bytes(matrix, "fp8") for matrix in layer_matrices(full, 61))
    assert mtp["weight_bytes"]["fp8"] - plain["weight_bytes"]["fp8"] == module
    assert mtp["parameters"] > plain["parameters"]
    text = " ".join(invoke(*args, "--mtp").stdout.split())
    assert "48,856 B per token" in text
    assert "if every draft is accepted" in text
    assert "every draft" not in " ".join(invoke(*args).stdout.split())


@pytest.mark.parametrize("args", [("--num-gpus", "1"), ("--num-gpus", "8", "--mtp"), ("--batch-size", "64")])
def test_the_parts_of_a_gpu_add_up(args: tuple[str, ...]) -> None:
    said = json.loads(invoke("full", "--target", "h200", "--contexts", "1K,125K", *args, "--json").stdout)
    for one in said["answers"]:
        held = one["bytes_per_gpu"]
        parts = {name: size for name, size in held.items() if name not in ("total", "usable")}
        assert set(parts) == {
            "weights", "cache", "indexer_scores", "scratch", "activations", "graphs", "cuda_context", "communication",
        }  # fmt: skip
        assert sum(parts.values()) == held["total"]
        assert (parts["communication"] > 0) is (one["tp"] * one["pp"] > 1)
        assert (parts["indexer_scores"] > 0) is (one["context"] > 2048), "up to index_topk keys are taken unscored"
        assert min(parts.values()) >= 0


def test_the_scores_and_the_rest_are_the_shared_scratch(full: ModelConfig) -> None:
    for context in (1024, 131072):
        work = Workload(context)
        memory = rank_memory(full, Parallelism(tp=8), work, precision="fp8", kv_format="fp8_ds", mtp=False)
        assert memory.indexer_scores + memory.scratch == scratch_bytes(full, Parallelism(tp=8), work, "fp8_ds")
        assert memory.indexer_scores == operator_scratch_bytes(full, Parallelism(tp=8), work, "fp8_ds")["DsaIndexer"]


def test_one_target_is_broken_down() -> None:
    one = invoke("full", "--target", "h200", "--contexts", "63K").stdout
    assert one.count("what fills that GPU") == 2, "for each precision"
    for name in ("indexer scores", "activations", "CUDA graphs", "CUDA context", "communication"):
        assert name in one
    two = invoke("full", "--target", "h200", "--target", "b200", "--contexts", "63K").stdout
    assert "what fills that GPU" not in two


def test_what_is_named_twice_is_answered_once() -> None:
    twice = ("--target", "h200", "--target", "h200", "--precision", "fp8", "--precision", "fp8")
    said = json.loads(invoke("full", *twice, "--contexts", "63K,1K,64512", "--json").stdout)
    assert [one["context"] for one in said["answers"]] == [1024, 64512]


def test_the_table_and_the_chart(tmp_path: Path) -> None:
    chart = tmp_path / "memory.svg"
    args = ("full", "--target", "h100", "--target", "h200", "--precision", "fp8", "--chart", str(chart))
    text = invoke(*args).stdout
    assert "weights in FP8, batch 1" in text
    assert "48,068 B per token" in text
    drawn = {element.text for element in ElementTree.fromstring(chart.read_text(encoding="utf-8")).iter()}
    assert {"1K", "63K", "125K", "usable memory"} <= drawn
    assert any(text and text.startswith("8 × h200") for text in drawn)
    assert any(text and text.startswith("h100  ") for text in drawn), "a row of the table"


def test_every_layout_is_printed_with_the_command_that_exports_it() -> None:
    for args in (("full",), ("full", "--ep", "--target", "h100,rtx4090", "--contexts", "1K,8K"), ("tiny",)):
        text = invoke(*args).stdout
        lines = [line.partition(": seekforge export CHECKPOINT PROGRAM") for line in text.splitlines()]
        told = {layout: rest.split() for layout, command, rest in lines if command}
        assert told and len({*map(tuple, told.values())}) == len(told)
        for layout, options in told.items():
            parsed = export.make_context("export", ["CHECKPOINT", "PROGRAM", *options]).params
            asked = Parallelism(tp=parsed["tp"], pp=parsed["pp"], ep=parsed["ep"])
            assert str(asked) == layout.partition("·DP")[0]
            check_parallelism(load_preset(args[0]).config, asked)


def test_a_checkpoint_needs_its_config_alone(tmp_path: Path) -> None:
    raw = yaml.safe_load((MODELS / "tiny.yaml").read_text(encoding="utf-8"))["config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    said = json.loads(invoke(str(tmp_path), "--target", "rtx4090", "--contexts", "1K", "--mtp", "--json").stdout)
    assert said["answers"][0]["num_gpus"] == 1


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (("nothing",), ConfigError, "neither a folder, nor a config.json, nor a name"),
        (("full", "--contexts", "200K"), ConfigError, r"the model ends at 163840 tokens \(160K"),
        (("full", "--target", "cpu"), TargetError, "is no GPU"),
        (
            ("full", "--tp", "3"),
            ConfigError,
            "--tp 3: num_attention_heads is 128, expected equal parts for 3 ranks; pass --tp 2 or --tp 4$",
        ),
        (("full", "--tp", "8", "--num-gpus", "4"), ConfigError, "TP8 is 8 GPUs, --num-gpus says 4"),
        (("full", "--target", "h200", "--contexts", "1K", "--chart", "x.bmp"), OutputError, r"ends in \.png or \.svg"),
    ],
)
def test_wrong_questions(args: tuple[str, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        invoke(*args)


# --- pure parts ---------------------------------------------------------------------------------------------


def test_tokens_are_written() -> None:
    assert tokens(131072) == "128K"
    assert tokens(100) == "100"
