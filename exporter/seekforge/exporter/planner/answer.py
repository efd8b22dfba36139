"""What fits where: the layouts of GPUs that hold a workload, and the best of them.

Pure functions over a config and a GPU's data sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from seekforge.exporter.builder.tensorrt.profiles import largest_step, spanning
from seekforge.exporter.models.sharding import fault_of
from seekforge.exporter.planner.question import Question
from seekforge.exporter.planner.speed import Speed, speed
from seekforge.exporter.sizing.memory import RankMemory, Workload, rank_memory, usable_bytes
from seekforge.exporter.sizing.scratch import ANY_KERNELS, Kernels
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import TargetConfig

#: Numbers of GPUs that are tried: what servers and small clusters have.
GPU_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
#: Tensor parallelism stays within one server.
MAX_TP = 8


@dataclass(frozen=True)
class Answer:
    """One layout on one kind of GPU.

    Attributes:
        parallelism: the layout.
        max_context: longest context at the asked batch, 0 when even one block does not fit.
        max_batch: most sequences at the asked context.
    """

    target: str
    parallelism: Parallelism
    memory: RankMemory
    usable: int
    max_context: int
    max_batch: int
    speed: Speed

    @property
    def fits(self) -> bool:
        """Whether the asked workload fits."""
        return self.memory.total <= self.usable


def layouts(num_gpus: int, config: ModelConfig, *, ep: bool = False) -> Iterator[Parallelism]:
    """Return the ways to use `num_gpus` that the model allows: tensor parallelism with pipeline stages or replicas.

    Args:
        num_gpus: how many.
        config: the model.
        ep: with expert parallelism, where there are ranks to deal experts out to. The bounds are the same with it and
            without, since they take experts to be chosen evenly; without, no rank has more to do than another.
    """
    seen: set[Parallelism] = set()
    for tp in (8, 4, 2, 1):
        if tp > min(num_gpus, MAX_TP) or num_gpus % tp:
            continue
        for name in ("pp", "dp"):
            one = Parallelism.model_validate({"tp": tp, "ep": ep and tp > 1, name: num_gpus // tp})
            if one not in seen and fault_of(config, one) is None:
                seen.add(one)
                yield one


def answer(
    config: ModelConfig, target: TargetConfig, parallelism: Parallelism, work: Workload, question: Question
) -> Answer:
    """Size one layout."""
    assert target.gpu is not None
    usable = usable_bytes(target.gpu.memory_gib)
    question = replace(question, target=target)

    def total(context: int, batch: int) -> RankMemory:
        return memory_of(config, parallelism, Workload(context, batch, work.step_tokens, work.draft_tokens), question)

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
        parallelism=parallelism,
        memory=total(work.context, work.batch),
        usable=usable,
        max_context=largest(config.max_position_embeddings, 64, lambda n: total(n, work.batch).total <= usable),
        max_batch=largest(65536, 1, lambda n: total(work.context, n).total <= usable),
        speed=speed(config, target, parallelism, work, question),
    )


def best(config: ModelConfig, target: TargetConfig, num_gpus: int, work: Workload, question: Question) -> Answer | None:
    """Return the layout of `num_gpus` that decodes fastest among those that fit, else the one that is least over."""
    choices = list(layouts(num_gpus, config, ep=question.ep))
    fitting = [one for one in choices if _fits(config, target, one, work, question)]
    if fitting:
        rates = {one: speed(config, target, one, work, question).decode_tokens_per_s for one in fitting}
        return answer(config, target, max(fitting, key=rates.__getitem__), work, question)
    sizes = {one: memory_of(config, one, work, replace(question, target=target)).total for one in choices}
    return answer(config, target, min(choices, key=sizes.__getitem__), work, question) if choices else None


def fewest(
    config: ModelConfig,
    target: TargetConfig,
    work: Workload,
    question: Question,
    counts: Sequence[int] = GPU_COUNTS,
) -> Answer | None:
    """Return the answer with the fewest GPUs that fits, or None."""
    for count in counts:
        choices = layouts(count, config, ep=question.ep)
        if any(_fits(config, target, one, work, question) for one in choices):
            return best(config, target, count, work, question)
    return None


def _fits(
    config: ModelConfig, target: TargetConfig, parallelism: Parallelism, work: Workload, question: Question
) -> bool:
    assert target.gpu is not None
    held = memory_of(config, parallelism, work, replace(question, target=target))
    return held.total <= usable_bytes(target.gpu.memory_gib)


def memory_of(config: ModelConfig, parallelism: Parallelism, work: Workload, question: Question) -> RankMemory:
    """Return what the fullest GPU of a layout holds."""
    target = question.target
    return rank_memory(
        config,
        parallelism,
        work,
        precision=question.precision,
        kv_format=question.kv_format,
        mtp=question.mtp,
        kernels=ANY_KERNELS if target is None else Kernels(target.sms, nvfp4_experts=question.precision == "nvfp4"),
        steps=None if target is None else _largest_steps(target, parallelism, work),
    )


def _largest_steps(target: TargetConfig, parallelism: Parallelism, work: Workload) -> list[tuple[int, int]]:
    """Return (sequences, new tokens of each) of every profile of an engine that is built for a workload."""
    batch = -(-work.batch // parallelism.dp)
    sizes = {
        "max_model_len": work.context,
        "max_batch_size": batch,
        "max_num_batched_tokens": max(work.step_tokens, batch),
    }
    limits = target.limits.model_copy(update=sizes)
    return [largest_step(profile, limits) for profile in spanning(target.profiles, limits).values()]
