"""Forecasts follow from bounds, launch plans and links, and rank layouts for what is wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from seekforge.exporter.builder import estimate
from seekforge.exporter.models import family_of
from seekforge.exporter.planner.api import plan, read_config
from seekforge.exporter.planner.forecast import ASSUMED, Assumptions, forecast, launches_of, rank_layouts
from seekforge.exporter.planner.question import Question
from seekforge.exporter.planner.ranking_chart import bars
from seekforge.exporter.planner.speed import speed
from seekforge.exporter.sizing.calls import StepShape, end_calls, step_calls
from seekforge.exporter.sizing.memory import Workload
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.formats.targets import load_target
from seekforge.plugins.cost import model
from seekforge.plugins.cost.card import card_of
from seekforge.plugins.cost.model import REPLAY_GAP_S
from seekforge.plugins.cost.work import Load
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.runtime.cli.main import main

FULL, H200 = read_config("full"), load_target("h200")
ASKED = Question("fp8", "fp8_ds", target=H200)
TP8 = Parallelism(tp=8)
#: What ranks add up of one token: in bf16 two values of a layer and the embedding, in f32 the logits.
STREAM, LOGITS = 7168 * 2, 129280 * 4
#: A machine that reaches its data sheet and costs nothing beside.
IDEAL = Assumptions(
    memory_share=1, compute_share=1, launch_estimates=False, launch_us=0, switch_us=0, bus_us=0, host_us=0, step_us=0
)


def work(batch: int = 1, context: int = 8192) -> Workload:
    return Workload(context, batch, H200.limits.max_num_batched_tokens)


@pytest.mark.parametrize("layout", [TP8, Parallelism(tp=8, pp=2), Parallelism(tp=8, dp=2)], ids=str)
def test_without_assumed_costs_it_is_the_bound_and_the_bytes_of_sums(layout: Parallelism) -> None:
    made = forecast(FULL, H200, layout, work(16), ASKED, IDEAL)
    assert made.kernels == pytest.approx(speed(FULL, H200, layout, work(16), ASKED).decode_step_ms)
    rows = 16 // layout.dp
    assert made.sums == pytest.approx(1e3 * 2 * 7 / 8 * rows * ((2 * 61 + 1) * STREAM + LOGITS) / 450e9)
    assert made.launches == made.host == 0
    assert made.links == pytest.approx(1e3 * (layout.pp - 1) * 2 * rows * 7168 * 2 / 20e9)


def test_launches_are_those_of_the_launch_plans() -> None:
    """Six FP8 products in a layer, two of them and two of BF16 at least one kernel each, attention, and experts."""
    dense, experts = (launches_of(FULL, layer, H200, TP8, work(), ASKED) for layer in (0, 3))
    assert 10 <= dense < experts < 60
    more = launches_of(FULL, 3, H200, TP8, work(context=65536), ASKED)
    assert more >= experts
    head = sum(
        len(op_kernels(op).plan(bound, 90).launches)
        for op, _, bound in end_calls(FULL, StepShape(1, 1, 8192), kv_format="fp8_ds", parallelism=TP8)
    )
    assert forecast(FULL, H200, TP8, work(), ASKED).launches == pytest.approx(
        1e-3 * ASSUMED.launch_us * (3 * dense + 58 * experts + head + 61 * ASSUMED.native_kernels)
    )


@pytest.mark.parametrize(("layout", "batch"), [(TP8, 1), (TP8, 128), (Parallelism(tp=8, pp=2), 16)], ids=str)
def test_kernels_take_no_less_than_their_launches_by_the_cost_model(layout: Parallelism, batch: int) -> None:
    """One home for what a GPU reaches: the share of the roof is the cost model's, as the times of launches are."""
    assert (ASSUMED.memory_share, ASSUMED.compute_share) == (model.MEMORY_SHARE, model.TENSOR_SHARE)
    shape = StepShape(batch, 1, 8192)
    calls = step_calls(FULL, shape, kv_format="fp8_ds", parallelism=layout)
    listed = estimate.rows(calls, {}, card_of(H200), Load(context=8192, num_experts=256), 90)
    by_launch = 1e3 * sum(row.count * row.estimate.seconds for row in listed)
    made = forecast(FULL, H200, layout, work(batch), ASKED)
    flat = forecast(FULL, H200, layout, work(batch), ASKED, replace(ASSUMED, launch_estimates=False))
    assert made.kernels >= flat.kernels and made.kernels >= by_launch * 0.999
    assert made.kernels <= flat.kernels + by_launch
    if layout.pp == 1:
        assert made.kernels == pytest.approx(max(flat.kernels, by_launch))
    wide = forecast(FULL, H200, layout, work(batch), replace(ASKED, precision="bf16"))
    assert (
        wide.kernels
        == forecast(
            FULL, H200, layout, work(batch), replace(ASKED, precision="bf16"), replace(ASSUMED, launch_estimates=False)
        ).kernels
    ), "the launches are of FP8 weights"


def test_small_launches_cost_more_than_their_bytes() -> None:
    """At batch 1 on eight GPUs most launches are too small for the bandwidth, which a flat share does not see."""
    made = forecast(FULL, H200, TP8, work(), ASKED)
    assert (
        made.kernels > 1.15 * forecast(FULL, H200, TP8, work(), ASKED, replace(ASSUMED, launch_estimates=False)).kernels
    )


@pytest.mark.parametrize(("name", "kv_format"), [("full", "fp8_ds"), ("glm5-full", "fp8_ds"), ("v3-full", "bf16")])
def test_they_are_the_launches_that_the_estimate_counts(name: str, kv_format: str) -> None:
    """Also where some layers take the keys of another's indexer, and where attention is dense."""
    config, asked = read_config(name), Question("fp8", kv_format, target=H200)  # pyright: ignore[reportArgumentType]
    ends = {parameter.module for parameter in family_of(config).end_parameters()}
    calls = [
        call
        for call in step_calls(config, StepShape(1, 1, 8192), kv_format=kv_format)
        if not call.what or call.what not in ends
    ]
    counted = sum(call.count * len(op_kernels(call.op).plan(call.bound, 90).launches) for call in calls)
    layers = range(config.num_hidden_layers)
    assert sum(launches_of(config, layer, H200, ONE_RANK, work(), asked) for layer in layers) == counted


def test_drafts_cost_a_layer_each() -> None:
    drafting = Workload(8192, 1, H200.limits.max_num_batched_tokens, draft_tokens=2)
    asked = replace(ASKED, mtp=True)
    plain, more = forecast(FULL, H200, TP8, work(), ASKED, IDEAL), forecast(FULL, H200, TP8, drafting, asked, IDEAL)
    assert more.tokens == 3 * plain.tokens and more.kernels > plain.kernels
    expected = ((2 * 63 + 3) * STREAM + 3 * LOGITS) / ((2 * 61 + 1) * STREAM + LOGITS)
    assert more.sums / plain.sums == pytest.approx(3 * expected), "three tokens of a row; twice more of all else"


def test_a_vocabulary_that_ranks_do_not_divide_is_not_added_up() -> None:
    odd = FULL.model_copy(update={"vocab_size": 129281})
    whole, divided = (forecast(config, H200, TP8, work(), ASKED, IDEAL).sums for config in (odd, FULL))
    assert divided - whole == pytest.approx(1e3 * 2 * 7 / 8 * (STREAM + LOGITS) / 450e9)


def test_a_slow_link_costs_more() -> None:
    slow = replace(H200, gpu=H200.gpu.model_copy(update={"link_gb_s": 32}))  # pyright: ignore[reportOptionalMemberAccess]
    fast, less = (forecast(FULL, one, TP8, work(64), ASKED) for one in (H200, slow))
    assert less.sums > 2 * fast.sums and less.kernels == fast.kernels
    assert fast.step_ms == pytest.approx(fast.kernels + fast.launches + fast.sums + fast.host)


def test_goals_rank_differently() -> None:
    quick = rank_layouts(FULL, H200, work(32), ASKED, "latency", None)
    busy = rank_layouts(FULL, H200, work(32), ASKED, "throughput", None)
    assert {one.parallelism for one in quick} == {one.parallelism for one in busy}
    steps = [one.forecast.step_ms for one in quick]
    rates = [one.forecast.tokens_per_gpu_s for one in busy]
    assert steps == sorted(steps) and rates == sorted(rates, reverse=True)
    assert busy[0].parallelism.num_gpus == 8, "more GPUs for one batch give less of each"
    assert all(one.parallelism.num_gpus == 16 for one in rank_layouts(FULL, H200, work(32), ASKED, "latency", 16))


def test_the_function_says_what_it_assumes() -> None:
    result = plan("full", target="h200", contexts=8192, batch_size=32, precision="fp8", goal="latency")
    facts = result.to_json()
    assert facts["goal"] == "latency" and facts["assumptions"]["memory_share"] == ASSUMED.memory_share
    (answer,) = facts["answers"]
    assert answer["ranking"][0]["step_ms"] == result.rankings[0][0].forecast.step_ms
    assert sum(answer["ranking"][0]["parts_ms"].values()) == pytest.approx(answer["ranking"][0]["step_ms"])
    (name, pieces), *_ = bars(result.rankings[0])
    assert name.startswith(str(result.rankings[0][0].parallelism))
    assert pieces[-1][1] + pieces[-1][2] == pytest.approx(answer["ranking"][0]["step_ms"])


def test_the_table_says_what_it_assumes() -> None:
    asked = "plan full --target h200 --contexts 8K --precision fp8 --num-gpus 8 --mtp --goal latency"
    result = CliRunner().invoke(main, asked.split())
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert f"{REPLAY_GAP_S * 1e6:g} us between kernels" in said and "every draft accepted" in said
