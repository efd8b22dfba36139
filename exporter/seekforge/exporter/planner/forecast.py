"""How long a decode step of a layout takes, as far as paper can say.

`speed` bounds a step from below; this adds what a real machine adds, by a few numbers that are assumed (`Assumptions`)
and stand beside every forecast. What a GPU reaches of its rates and the gap between launches are the cost model's
(`plugins/cost/model.py`). Launches are those of the very launch plans that the kernels have, each with the time that
the cost model gives its shapes; TensorRT's own kernels are counted as so many for a layer. No GPU has confirmed any of
it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, Literal

from seekforge.exporter.builder.estimate import rows as rows_of
from seekforge.exporter.planner.answer import GPU_COUNTS, layouts, memory_of
from seekforge.exporter.planner.question import Question
from seekforge.exporter.planner.speed import decode_times
from seekforge.exporter.sizing.calls import Call, StepShape, end_calls, layer_calls
from seekforge.exporter.sizing.memory import Workload, usable_bytes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import TargetConfig
from seekforge.plugins.cost.card import Card, card_of
from seekforge.plugins.cost.model import MEMORY_SHARE, REPLAY_GAP_S, TENSOR_SHARE
from seekforge.plugins.cost.work import Load
from seekforge.plugins.kernels.index import kernel_sm

Goal = Literal["latency", "throughput"]
#: A layout of more GPUs is tried up to so many times the fewest that fit.
_MOST_TIMES: Final = 4
#: Links at least this fast go over a switch; others are a bus.
_SWITCHED_GB_S: Final = 200.0


@dataclass(frozen=True)
class Assumptions:
    """What a forecast takes for granted.

    Attributes:
        memory_share, compute_share: the parts of the data sheet's bandwidth and dense rate that kernels reach, as
            `kernels estimate` has them.
        launch_estimates: whether the kernels of a stage take no less than its launches one after another, each by what
            `kernels estimate --counts-only` says of it. It knows FP8 weights alone.
        launch_us: between two kernels of a captured graph, as `kernels estimate` has it.
        native_kernels: TensorRT's own, for a layer, after fusion.
        switch_us, bus_us: a sum over ranks that is infinitely small: over NVLink and a switch, or over a bus.
        host_gb_s, host_us: the rate at which values go from a pipeline stage to the next over the host, and what that
            costs beside.
        step_us: the host's part of a step: scheduling, sampling, copies.
    """

    memory_share: float = MEMORY_SHARE
    compute_share: float = TENSOR_SHARE
    launch_estimates: bool = True
    launch_us: float = REPLAY_GAP_S * 1e6
    native_kernels: int = 25
    switch_us: float = 12.0
    bus_us: float = 30.0
    host_gb_s: float = 20.0
    host_us: float = 60.0
    step_us: float = 500.0

    def __str__(self) -> str:
        return (
            f"{self.memory_share:.0%} of the memory bandwidth, {self.compute_share:.0%} of the FLOPs"
            f"{', and no less than the launches by their shapes' if self.launch_estimates else ''}, "
            f"{self.launch_us:g} us between kernels, {self.native_kernels} kernels of TensorRT in a layer, a sum over "
            f"ranks {self.switch_us:.0f} us ({self.bus_us:.0f} without NVLink) and its bytes, stages one after the "
            f"other over the host ({self.host_gb_s:.0f} GB/s, {self.host_us:.0f} us), {self.step_us:.0f} us of host "
            "a step"
        )


ASSUMED: Final = Assumptions()


@dataclass(frozen=True)
class Forecast:
    """The time of one decode step of all sequences, by parts, in milliseconds.

    Attributes:
        kernels: reading weights and caches, or multiplying, or our launches by their estimates one after another,
            whichever takes longest in each stage.
        launches: gaps between kernels.
        sums: collectives of tensor-parallel ranks: two in a layer, and where they divide the vocabulary one of the
            embedding and one of the logits.
        links: what goes from stage to stage.
        host: scheduling and sampling.
        tokens: the tokens that a step gives over all replicas, if every draft is accepted.
        num_gpus: GPUs of the layout.
    """

    kernels: float
    launches: float
    sums: float
    links: float
    host: float
    tokens: int
    num_gpus: int

    @property
    def step_ms(self) -> float:
        """The whole step."""
        return self.kernels + self.launches + self.sums + self.links + self.host

    @property
    def tokens_per_s(self) -> float:
        """Over all sequences."""
        return 1e3 * self.tokens / self.step_ms

    @property
    def tokens_per_gpu_s(self) -> float:
        """The same for each GPU."""
        return self.tokens_per_s / self.num_gpus


@dataclass(frozen=True)
class Ranked:
    """A layout that fits, and its forecast."""

    parallelism: Parallelism
    forecast: Forecast


def rank_layouts(
    config: ModelConfig, target: TargetConfig, work: Workload, question: Question, goal: Goal, num_gpus: int | None
) -> list[Ranked]:
    """Return the layouts that hold a workload, the best for a goal first.

    Args:
        config, target, work, question: what is asked.
        goal: the shortest step, or the most tokens per second of each GPU.
        num_gpus: exactly so many; None: from the fewest that fit to four times as many.
    """
    assert target.gpu is not None
    ranked: list[Ranked] = []
    for count in GPU_COUNTS if num_gpus is None else (num_gpus,):
        if ranked and count > _MOST_TIMES * ranked[0].parallelism.num_gpus:
            break
        for layout in layouts(count, config, ep=question.ep):
            if memory_of(config, layout, work, _for(question, target)).total <= usable_bytes(target.gpu.memory_gib):
                ranked.append(Ranked(layout, forecast(config, target, layout, work, question)))
    if goal == "latency":
        return sorted(ranked, key=lambda one: (one.forecast.step_ms, one.parallelism.num_gpus))
    return sorted(ranked, key=lambda one: -one.forecast.tokens_per_gpu_s)


def forecast(
    config: ModelConfig,
    target: TargetConfig,
    parallelism: Parallelism,
    work: Workload,
    question: Question,
    assumed: Assumptions = ASSUMED,
) -> Forecast:
    """Forecast one decode step of a layout."""
    assert target.gpu is not None
    rows = -(-work.batch // parallelism.dp) * (1 + work.draft_tokens)
    drafts = work.draft_tokens if question.mtp else 0  # the module is a layer like the last, once for each draft
    last = config.num_hidden_layers - 1
    by_launch = assumed.launch_estimates and question.precision != "bf16"
    kernels = launches = 0.0
    for layers, memory_s, compute_s in decode_times(config, target, parallelism, work, question):
        ours = [_layer_launches(config, layer, target, parallelism, work, question) for layer in layers]
        if last in layers:
            ours += [ours[-1]] * drafts
        launches += len(ours) * assumed.native_kernels
        if last in layers:
            ours += [_layer_launches(config, None, target, parallelism, work, question)] * (1 + drafts)
        launches += sum(one.count for one in ours)
        flat = max(memory_s / assumed.memory_share, compute_s / assumed.compute_share)
        kernels += max(flat, sum(one.seconds for one in ours)) if by_launch else flat
    stream_bytes = rows * config.hidden_size * 2
    sums = 0.0
    if parallelism.tp > 1:
        rate = target.gpu.link_gb_s or assumed.host_gb_s
        least = (assumed.switch_us if rate >= _SWITCHED_GB_S else assumed.bus_us) * 1e-6

        def summed(num_bytes: int) -> float:
            return least + 2 * (parallelism.tp - 1) / parallelism.tp * num_bytes / (rate * 1e9)

        sums = 2 * (config.num_hidden_layers + drafts) * summed(stream_bytes)
        if parallelism.divides_vocabulary(config):  # the embedding, and the logits in f32
            sums += (1 + drafts) * (summed(stream_bytes) + summed(rows * config.vocab_size * 4))
    link = assumed.host_us * 1e-6 + 2 * stream_bytes / (assumed.host_gb_s * 1e9)  # down, and up again
    return Forecast(
        kernels=1e3 * kernels,
        launches=1e-3 * launches * assumed.launch_us,
        sums=1e3 * sums,
        links=1e3 * (parallelism.pp - 1) * link,
        host=1e-3 * assumed.step_us,
        tokens=work.batch * (1 + work.draft_tokens),
        num_gpus=parallelism.num_gpus,
    )


def launches_of(
    config: ModelConfig,
    layer: int,
    target: TargetConfig,
    parallelism: Parallelism,
    work: Workload,
    question: Question,
) -> int:
    """Return how many kernels of ours a decode step launches in one layer, by their launch plans."""
    return _layer_launches(config, layer, target, parallelism, work, question).count


@dataclass(frozen=True)
class _Launched:
    """Launches of some calls: how many, and their seconds one after another, without gaps."""

    count: int
    seconds: float


def _layer_launches(
    config: ModelConfig,
    layer: int | None,
    target: TargetConfig,
    parallelism: Parallelism,
    work: Workload,
    question: Question,
) -> _Launched:
    """Return the launches of one layer in a decode step; of the head for None."""
    same = layer
    if layer is not None:
        same = next(one for one in range(layer + 1) if config.layer_kind(one) == config.layer_kind(layer))
    batch = -(-work.batch // parallelism.dp)
    shape = StepShape(batch, 1 + work.draft_tokens, max(work.context, 1 + work.draft_tokens))
    card, nvfp4 = card_of(target), question.precision == "nvfp4"
    return _launched(config, same, card, parallelism, shape, question.kv_format, nvfp4)  # pyright: ignore[reportArgumentType] - hashable


@functools.lru_cache(maxsize=4096)
def _launched(
    config: ModelConfig,
    layer: int | None,
    card: Card,
    parallelism: Parallelism,
    shape: StepShape,
    kv_format: str,
    nvfp4_experts: bool,
) -> _Launched:
    if layer is None:
        calls = end_calls(config, shape, kv_format=kv_format, parallelism=parallelism)
    else:
        calls = layer_calls(
            config, layer, shape, kv_format=kv_format, parallelism=parallelism, nvfp4_experts=nvfp4_experts
        )
    load = Load(context=shape.context, num_experts=config.n_routed_experts)
    listed = rows_of([Call(op, what, bound, 1) for op, what, bound in calls], {}, card, load, kernel_sm(card.sm))
    return _Launched(len(listed), sum(row.estimate.seconds for row in listed))


def _for(question: Question, target: TargetConfig) -> Question:
    return Question(question.precision, question.kv_format, question.mtp, question.ep, target)
