"""How fast a layout can be at best.

Speeds are bounds, not forecasts: bytes over memory bandwidth or FLOPs over the dense rate, whichever takes longer,
without communication, launches or anything else that a real machine adds. Tokens are taken to choose experts evenly,
and every drafted token to be accepted.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace

from seekforge.exporter.planner.question import Question
from seekforge.exporter.sizing.flops import (
    Flops,
    attention_flops,
    indexer_flops,
    linear_flops,
    prefill_attention_flops,
    seen_keys,
)
from seekforge.exporter.sizing.matrices import Matrix, Precision, end_matrices, layer_matrices, num_indexers
from seekforge.exporter.sizing.memory import KvFormat, Workload, cache_row_bytes
from seekforge.exporter.sizing.stages import rank_share, rank_weight_bytes, stages
from seekforge.formats.checkpoint.model_config import LayerKind, ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import FP8_SM, TargetConfig
from seekforge.plugins.cost.work import experts_hit

_NO_FLOPS = Flops()


@dataclass(frozen=True)
class Speed:
    """Upper bounds of speed, lower bounds of time.

    Attributes:
        decode_tokens_per_s: over all sequences, drafted tokens included.
        decode_step_ms: time of one step of all, through all stages.
        decode_bound: memory or compute, in the slowest stage.
        prefill_tokens_per_s: prompts of the whole context, steps filled with them and stages kept busy.
        prefill_s: one such prompt, alone.
    """

    decode_tokens_per_s: float
    decode_step_ms: float
    decode_bound: str
    prefill_tokens_per_s: float
    prefill_s: float


def decode_times(
    config: ModelConfig, target: TargetConfig, parallelism: Parallelism, work: Workload, question: Question
) -> list[tuple[range, float, float]]:
    """Return for each pipeline stage its layers, and the least seconds for bytes and for FLOPs of one decode step.

    The step is of all sequences of the replica that has most.
    """
    machine = _Machine(config, target, parallelism, question)
    batch = -(-work.batch // parallelism.dp)
    return [(stage.layers, *_decode_s(machine, stage, work, batch)) for stage in machine.stages]


def speed(
    config: ModelConfig, target: TargetConfig, parallelism: Parallelism, work: Workload, question: Question
) -> Speed:
    """Bound the decode and prefill speed of a layout."""
    machine = _Machine(config, target, parallelism, question)
    cut, produced = machine.stages, work.batch * (1 + work.draft_tokens)
    work = replace(work, batch=-(-work.batch // parallelism.dp))  # of the replica that has most
    cycle, bound = _decode_cycle(machine, work)
    whole = [_decode_s(machine, stage, work, work.batch) for stage in cut]

    chunk = work.context % work.step_tokens or work.step_tokens
    packed = [_prefill_s(machine, stage, work.context, work.context / work.step_tokens) for stage in cut]
    alone = [_prefill_s(machine, stage, work.context, -(-work.context // work.step_tokens)) for stage in cut]
    short = [_prefill_s(machine, stage, chunk, 1) for stage in cut]
    return Speed(
        decode_tokens_per_s=produced / cycle,
        decode_step_ms=1e3 * sum(map(max, whole)),
        decode_bound=bound,
        prefill_tokens_per_s=parallelism.dp * work.context / max(packed),
        # while one stage works off the prompt, the others need at least the shortest chunk
        prefill_s=max(sum(short) - chunk_s + prompt_s for chunk_s, prompt_s in zip(short, alone, strict=True)),
    )


@dataclass(frozen=True)
class _Weights:
    """What a group of matrices costs on one rank: bytes read in a step, and FLOPs of one token.

    Attributes:
        fixed_bytes, fixed: bytes and FLOPs of what every token meets, without the head.
        expert_bytes, experts: bytes of all routed experts of the rank; FLOPs of those that a token chooses.
        head_bytes, head: bytes and FLOPs of the head, which only tokens meet whose successor is wanted.
    """

    fixed_bytes: float = 0.0
    fixed: Flops = _NO_FLOPS
    expert_bytes: float = 0.0
    experts: Flops = _NO_FLOPS
    head_bytes: float = 0.0
    head: Flops = _NO_FLOPS

    def __add__(self, other: _Weights) -> _Weights:
        return _Weights(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __mul__(self, count: int) -> _Weights:
        return _Weights(*(getattr(self, part.name) * count for part in fields(self)))


@dataclass(frozen=True)
class _Stage:
    """One pipeline stage: the main model's layers in it, and the MTP module behind the last one.

    Attributes:
        layers: the layers of the main model that it has.
        weights: those of these layers, with the head where it is.
        draft: weights of the MTP module, which uses the head once more; None elsewhere.
    """

    layers: range
    weights: _Weights
    draft: _Weights | None


class _Machine:
    """A model on GPUs: what the times of its stages are made of."""

    def __init__(self, config: ModelConfig, target: TargetConfig, parallelism: Parallelism, question: Question) -> None:
        assert target.gpu is not None
        self.config, self.target, self.parallelism, self.question = config, target, parallelism, question
        self.bandwidth = target.gpu.bandwidth_gb_s * 1e9
        cut = stages(config, parallelism, question.precision, mtp=question.mtp)
        self.stages = [self._stage(layers, is_last=number == len(cut) - 1) for number, (layers, _) in enumerate(cut)]

    def _stage(self, layers: range, *, is_last: bool) -> _Stage:
        config, parallelism, precision = self.config, self.parallelism, self.question.precision
        weights = _Weights()
        alike: dict[LayerKind, list[int]] = {}
        for layer in layers:
            alike.setdefault(config.layer_kind(layer), []).append(layer)
        for same in alike.values():
            weights += _layer_weights(config, same[0], parallelism, precision) * len(same)  # pyright: ignore[reportArgumentType] - hashable
        if not is_last:
            return _Stage(layers, weights, None)
        head = _sum_weights(config, end_matrices(config)[1], parallelism, precision)
        draft = None
        if self.question.mtp and config.mtp_layer is not None:
            draft = _layer_weights(config, config.mtp_layer, parallelism, precision)  # pyright: ignore[reportArgumentType]
            draft += _Weights(head_bytes=head.head_bytes, head=head.head)
        return _Stage(layers, weights + head, draft)

    def read_bytes(self, weights: _Weights, num_tokens: float) -> float:
        """Bytes that a step of `num_tokens` tokens reads of the weights but the head."""
        config = self.config
        hit = experts_hit(config.n_routed_experts, config.num_experts_per_tok, num_tokens) / config.n_routed_experts
        return weights.fixed_bytes + weights.expert_bytes * hit

    def products(self, weights: _Weights, *, tokens: float, heads: float) -> Flops:
        """FLOPs on one rank for `tokens` tokens, of which `heads` get logits."""
        return (weights.fixed + weights.experts) * tokens + weights.head * heads

    def attention(self, flops: Flops) -> Flops:
        """FLOPs on one rank: heads of the attention are divided by TP; the indexer is not."""
        return Flops(fp8=flops.fp8, bf16=flops.bf16 / self.parallelism.tp)

    def seconds(self, flops: Flops) -> float:
        """Time of `flops` on one rank."""
        return seconds(flops, self.target, self.question.precision)


def _decode_cycle(machine: _Machine, work: Workload) -> tuple[float, str]:
    """Return the least seconds in which every sequence gets a step, and what bounds them, memory or compute.

    Sequences pass the stages in groups, and a group comes back when it has passed all. Few groups leave stages idle;
    many read the weights of a stage often. The number of groups is the best one: up to it the largest group's way
    through all stages is the longer time, behind it the work of the slowest stage on all groups.
    """
    cut = machine.stages
    least = [_decode_s(machine, stage, work, 1)[0] for stage in cut]
    compute = max(_decode_s(machine, stage, work, work.batch)[1] for stage in cut)

    def busiest(groups: int) -> float:
        # reads of all groups are least when all but one hold a single sequence
        most = [_decode_s(machine, stage, work, max(1, work.batch - groups + 1))[0] for stage in cut]
        return max(compute, *(large + (groups - 1) * small for large, small in zip(most, least, strict=True)))

    def passing(groups: int) -> list[tuple[float, float]]:
        return [_decode_s(machine, stage, work, -(-work.batch // groups)) for stage in cut]

    def cycle(groups: int) -> float:
        return max(busiest(groups), sum(map(max, passing(groups))))

    low, high = 1, work.batch if len(cut) > 1 else 1
    while low < high:
        middle = (low + high) // 2
        if busiest(middle) >= sum(map(max, passing(middle))):
            high = middle
        else:
            low = middle + 1
    groups = min((max(1, low - 1), low), key=cycle)
    slowest = max(passing(groups), key=max)
    is_compute = slowest[1] > slowest[0] or cycle(groups) == compute
    return cycle(groups), "compute" if is_compute else "memory"


def _decode_s(machine: _Machine, stage: _Stage, work: Workload, batch: int) -> tuple[float, float]:
    """Return the seconds for bytes and for FLOPs of one decode step of `batch` sequences of a replica in one stage.

    The MTP module sees every token of the step, drafts from the last and reads its weights once per draft.
    """
    config, drafts = machine.config, work.draft_tokens
    queries = 1 + drafts
    kv_format, context = machine.question.kv_format, work.context
    rows = batch * queries
    read = machine.read_bytes(stage.weights, rows) + stage.weights.head_bytes
    read += batch * cache_read_bytes(config, kv_format, context, stage.layers)
    flops = machine.products(stage.weights, tokens=rows, heads=rows)
    flops += machine.attention(_attention_flops(config, context, stage.layers)) * rows
    if stage.draft is not None and drafts:
        module = _draft_layers(config)
        cached = cache_read_bytes(config, kv_format, context, module)
        read += machine.read_bytes(stage.draft, rows)
        read += (drafts - 1) * machine.read_bytes(stage.draft, batch)
        read += drafts * (stage.draft.head_bytes + batch * cached)
        seen = batch * (queries + drafts - 1)
        flops += machine.products(stage.draft, tokens=seen, heads=batch * drafts)
        flops += machine.attention(_attention_flops(config, context, module)) * seen
    return read / machine.bandwidth, machine.seconds(flops)


def _prefill_s(machine: _Machine, stage: _Stage, prompt: int, steps: float) -> float:
    """Return the seconds of one stage for one prompt.

    Args:
        machine, stage: where.
        prompt: tokens.
        steps: number of steps in which its weights are read; less than one when prompts share a step.
    """
    modules: list[tuple[_Weights, Collection[int]]] = [(stage.weights, stage.layers)]
    if stage.draft is not None:
        modules.append((stage.draft, _draft_layers(machine.config)))
    read, flops = 0.0, Flops()
    for weights, layers in modules:
        read += steps * machine.read_bytes(weights, prompt / steps) + min(steps, 1) * weights.head_bytes
        flops += machine.products(weights, tokens=prompt, heads=1)
        flops += machine.attention(_prefill_attention_flops(machine.config, prompt, layers))
    return max(read / machine.bandwidth, machine.seconds(flops))


@functools.lru_cache(maxsize=1024)
def _layer_weights(config: ModelConfig, layer: int, parallelism: Parallelism, precision: Precision) -> _Weights:
    return _sum_weights(config, layer_matrices(config, layer), parallelism, precision)


def _sum_weights(
    config: ModelConfig, matrices: Iterable[Matrix], parallelism: Parallelism, precision: Precision
) -> _Weights:
    total = _Weights()
    for matrix in matrices:
        held = rank_weight_bytes(matrix, parallelism, precision)
        flops = linear_flops(config, [matrix]) * (1 / rank_share(matrix, parallelism))
        if precision == "nvfp4" and matrix.has_nvfp4:
            flops = Flops(bf16=flops.total)
        if matrix.is_head:
            total += _Weights(head_bytes=held, head=flops)
        elif matrix.sharding == "experts":
            total += _Weights(expert_bytes=held, experts=flops)
        else:
            total += _Weights(fixed_bytes=held, fixed=flops)
    return total


def _draft_layers(config: ModelConfig) -> tuple[int, ...]:
    """Return the layer of the MTP module."""
    return () if config.mtp_layer is None else (config.mtp_layer,)


def _attention_flops(config: ModelConfig, context: int, layers: Collection[int]) -> Flops:
    """Of one token in some layers; a context that is selected whole needs no scores."""
    flops = attention_flops(config, context, layers=layers)
    return flops if context > config.index_topk else Flops(bf16=flops.bf16)


def _prefill_attention_flops(config: ModelConfig, prompt: int, layers: Collection[int]) -> Flops:
    """Of a prompt in some layers, without the scores of tokens that see no more keys than are selected."""
    near = seen_keys(config, prompt)
    unneeded = num_indexers(config, layers) * indexer_flops(config, near * (near + 1) / 2)
    flops = prefill_attention_flops(config, prompt, layers=layers)
    return Flops(fp8=flops.fp8 - unneeded, bf16=flops.bf16)


def seconds(work: Flops, target: TargetConfig, precision: Precision) -> float:
    """Return the time of `work` at the dense rates of a GPU; FP8 falls back to BF16 where it is not there."""
    assert target.gpu is not None
    has_fp8 = target.gpu.fp8_tflops is not None and (target.sm or 0) >= FP8_SM and precision != "bf16"
    fp8_rate = target.gpu.fp8_tflops if has_fp8 else target.gpu.bf16_tflops
    assert fp8_rate is not None
    return work.fp8 / (fp8_rate * 1e12) + work.bf16 / (target.gpu.bf16_tflops * 1e12)


def cache_read_bytes(config: ModelConfig, kv_format: KvFormat, context: int, layers: Collection[int]) -> int:
    """Bytes that one decoded token reads of some layers' caches: every indexer key, and the selected latents."""
    latent, index = cache_row_bytes(config, kv_format)
    scored = context if context > config.index_topk else 0  # a short context needs no scores
    return num_indexers(config, layers) * index * scored + len(layers) * latent * int(seen_keys(config, context))
