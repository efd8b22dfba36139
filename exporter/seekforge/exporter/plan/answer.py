"""What fits where, and how fast it can be at best. Pure functions over a config and a GPU's data sheet.

Speeds are bounds, not forecasts: bytes over memory bandwidth or FLOPs over the dense rate, whichever takes longer,
without communication, launches or anything else that a real machine adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from seekforge.exporter.build.targets import FP8_SM, TargetConfig
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.sizing import (
    Flops,
    KvFormat,
    Layout,
    Matrix,
    Precision,
    RankMemory,
    Workload,
    attention_flops,
    cache_bytes_per_token,
    end_matrices,
    fault_of,
    layer_matrices,
    linear_flops,
    prefill_attention_flops,
    rank_memory,
    rank_weight_bytes,
    stages,
    usable_bytes,
)

#: Numbers of GPUs that are tried: what servers and small clusters have.
GPU_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
#: Tensor parallelism stays within one server.
MAX_TP = 8


@dataclass(frozen=True)
class Question:
    """What is asked of a plan, beside the GPU and the workload."""

    precision: Precision
    kv_format: KvFormat
    mtp: bool = False


@dataclass(frozen=True)
class Speed:
    """Upper bounds.

    Attributes:
        decode_tokens_per_s: over all sequences.
        decode_step_ms: of one step of all, through all stages.
        decode_bound: memory or compute.
        prefill_tokens_per_s: one prompt of the whole context after another, stages kept busy.
        prefill_s: one such prompt, alone.
    """

    decode_tokens_per_s: float
    decode_step_ms: float
    decode_bound: str
    prefill_tokens_per_s: float
    prefill_s: float


@dataclass(frozen=True)
class Answer:
    """One layout on one kind of GPU.

    Attributes:
        max_context: longest context at the asked batch, 0 when even one block does not fit.
        max_batch: most sequences at the asked context.
    """

    target: str
    layout: Layout
    memory: RankMemory
    usable: int
    max_context: int
    max_batch: int
    speed: Speed

    @property
    def fits(self) -> bool:
        """Whether the asked workload fits."""
        return self.memory.total <= self.usable


def layouts(num_gpus: int, config: ModelConfig) -> Iterator[Layout]:
    """Return the ways to use `num_gpus` that the model allows: TP, TP with PP, DP attention with EP, and PP alone."""
    seen: set[Layout] = set()
    tps = [tp for tp in (8, 4, 2, 1) if tp <= min(num_gpus, MAX_TP) and num_gpus % tp == 0]
    candidates = [Layout(tp=tp, pp=num_gpus // tp) for tp in tps]
    candidates += [Layout(tp=tp, dp=num_gpus // tp) for tp in tps]
    for layout in candidates:
        if layout not in seen and fault_of(layout, config) is None:
            seen.add(layout)
            yield layout


def answer(config: ModelConfig, target: TargetConfig, layout: Layout, work: Workload, question: Question) -> Answer:
    """Size one layout."""
    assert target.gpu is not None
    usable = usable_bytes(target.gpu.memory_gib)

    def total(context: int, batch: int) -> RankMemory:
        return _memory(config, layout, Workload(context, batch, work.step_tokens, work.draft_tokens), question)

    def largest(limit: int, step: int, fits: Callable[[int], bool]) -> int:
        low, high = 0, limit // step
        while low < high:
            middle = (low + high + 1) // 2
            if fits(middle * step):
                low = middle
            else:
                high = middle - 1
        return low * step

    return Answer(
        target=target.name,
        layout=layout,
        memory=total(work.context, work.batch),
        usable=usable,
        max_context=largest(config.max_position_embeddings, 64, lambda n: total(n, work.batch).total <= usable),
        max_batch=largest(65536, 1, lambda n: total(work.context, n).total <= usable),
        speed=speed(config, target, layout, work, question),
    )


def best(config: ModelConfig, target: TargetConfig, num_gpus: int, work: Workload, question: Question) -> Answer | None:
    """Return the layout of `num_gpus` that decodes fastest among those that fit, else the one that is least over."""
    found = list(layouts(num_gpus, config))
    fitting = [layout for layout in found if _fits(config, target, layout, work, question)]
    if fitting:
        rates = {one: speed(config, target, one, work, question).decode_tokens_per_s for one in fitting}
        return answer(config, target, max(fitting, key=rates.__getitem__), work, question)
    sizes = {one: _memory(config, one, work, question).total for one in found}
    return answer(config, target, min(found, key=sizes.__getitem__), work, question) if found else None


def fewest(
    config: ModelConfig,
    target: TargetConfig,
    work: Workload,
    question: Question,
    counts: Sequence[int] = GPU_COUNTS,
) -> Answer | None:
    """Return the answer with the fewest GPUs that fits, or None."""
    for count in counts:
        if any(_fits(config, target, layout, work, question) for layout in layouts(count, config)):
            return best(config, target, count, work, question)
    return None


def _fits(config: ModelConfig, target: TargetConfig, layout: Layout, work: Workload, question: Question) -> bool:
    assert target.gpu is not None
    return _memory(config, layout, work, question).total <= usable_bytes(target.gpu.memory_gib)


def _memory(config: ModelConfig, layout: Layout, work: Workload, question: Question) -> RankMemory:
    return rank_memory(
        config, layout, work, precision=question.precision, kv_format=question.kv_format, mtp=question.mtp
    )


def speed(config: ModelConfig, target: TargetConfig, layout: Layout, work: Workload, question: Question) -> Speed:
    """Bound the decode and prefill speed of a layout; the slowest pipeline stage decides the rate."""
    assert target.gpu is not None
    bandwidth = target.gpu.bandwidth_gb_s * 1e9
    per_rank = -(-work.batch // layout.dp)
    queries = 1 + work.draft_tokens
    cut = stages(config, layout, question.precision, mtp=question.mtp)
    decode, bound, prefill = [], [], []
    for number, (layers, _) in enumerate(cut):
        matrices = list(_stage_matrices(config, layers, is_first=number == 0, is_last=number == len(cut) - 1))
        tokens = per_rank * queries
        everyone = tokens * layout.dp
        read = sum(_read_bytes(matrix, layout, question.precision, everyone) for matrix in matrices)
        read += per_rank * len(layers) * cache_read_bytes(config, question.kv_format, work.context)
        linear, core = linear_flops(config, matrices), attention_flops(config, work.context, num_layers=len(layers))
        # heads of the attention are divided by TP; the indexer is not
        share = Flops(fp8=core.fp8, bf16=core.bf16 / layout.tp)
        compute = seconds(linear * (everyone / layout.ep) + share * tokens, target, question.precision)
        memory = read / bandwidth
        decode.append(max(compute, memory))
        bound.append("memory" if memory >= compute else "compute")
        whole = prefill_attention_flops(config, work.context, num_layers=len(layers))
        share = Flops(fp8=whole.fp8, bf16=whole.bf16 / layout.tp)
        steps = -(-work.context // work.step_tokens)
        weights = sum(_read_bytes(m, layout, question.precision, min(work.step_tokens, work.context)) for m in matrices)
        work_s = seconds(linear * (work.context / layout.tp) + share, target, question.precision)
        prefill.append(max(work_s, steps * weights / bandwidth))
    slowest = max(range(len(decode)), key=decode.__getitem__)
    return Speed(
        decode_tokens_per_s=work.batch / decode[slowest] / (len(cut) if work.batch < len(cut) else 1),
        decode_step_ms=1e3 * sum(decode),
        decode_bound=bound[slowest],
        prefill_tokens_per_s=layout.dp * work.context / max(prefill),
        prefill_s=sum(prefill),
    )


def seconds(work: Flops, target: TargetConfig, precision: Precision) -> float:
    """Return the time of `work` at the dense rates of a GPU; FP8 falls back to BF16 where it is not there."""
    assert target.gpu is not None
    has_fp8 = target.gpu.fp8_tflops is not None and (target.sm or 0) >= FP8_SM and precision == "fp8"
    fp8_rate = target.gpu.fp8_tflops if has_fp8 else target.gpu.bf16_tflops
    assert fp8_rate is not None
    return work.fp8 / (fp8_rate * 1e12) + work.bf16 / (target.gpu.bf16_tflops * 1e12)


def cache_read_bytes(config: ModelConfig, kv_format: KvFormat, context: int) -> int:
    """Bytes that one decoded token reads of one layer's cache: every indexer key, and the selected latents."""
    both = cache_bytes_per_token(config, kv_format, num_layers=1)
    index = (
        config.index_head_dim + 4
        if kv_format == "fp8_ds"
        else both * config.index_head_dim // (config.index_head_dim + config.latent_dim)
    )
    scored = context if context > config.index_topk else 0  # a short context needs no scores
    return index * scored + (both - index) * min(context, config.index_topk)


def experts_hit(num_experts: int, per_token: int, num_tokens: int) -> float:
    """Return how many experts a step of `num_tokens` reads, if tokens choose evenly and independently."""
    return num_experts * (1.0 - (1.0 - per_token / num_experts) ** num_tokens)


def _read_bytes(matrix: Matrix, layout: Layout, precision: Precision, num_tokens: int) -> float:
    held = rank_weight_bytes(matrix, layout, precision)
    if matrix.name == "embed_tokens":
        return 0.0  # a few rows
    if matrix.sharding != "experts":
        return held
    experts = matrix.count // 2 if matrix.name.endswith("gate_up") else matrix.count
    active = matrix.active // 2 if matrix.name.endswith("gate_up") else matrix.active
    return held * experts_hit(experts, active, num_tokens) / experts


def _stage_matrices(config: ModelConfig, layers: Iterable[int], *, is_first: bool, is_last: bool) -> Iterator[Matrix]:
    first, last = end_matrices(config)
    if is_first:
        yield from first
    for layer in layers:
        yield from layer_matrices(config, layer)
    if is_last:
        yield from last
