"""`seekforge.plan`: which GPUs a model needs, and how many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from seekforge.common.cli.charts import check_chart, tokens
from seekforge.common.configs import known, load_yaml
from seekforge.common.errors import ConfigError, TargetError
from seekforge.exporter.calls import AnyPath, Count, Counts, Flag, Precisions, Source, Sources, many, public
from seekforge.exporter.checkpoint.source import headers, parse_repo
from seekforge.exporter.models import family_of
from seekforge.exporter.models.sharding import check_parallelism
from seekforge.exporter.planner.answer import Answer, answer, best, fewest
from seekforge.exporter.planner.chart import Row, write_plan_chart
from seekforge.exporter.planner.forecast import ASSUMED, Goal, Ranked, rank_layouts
from seekforge.exporter.planner.question import Question
from seekforge.exporter.planner.ranking_chart import PARTS, write_ranking_chart
from seekforge.exporter.sizing.matrices import (
    Precision,
    active_parameters,
    all_layers,
    checkpoint_bytes,
    num_parameters,
    weight_bytes,
)
from seekforge.exporter.sizing.memory import KvFormat, Workload, cache_bytes_per_token
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import NVFP4_SM, TargetConfig, all_targets, load_target

_CONTEXTS = (1024, 8192, 32768, 64512, 128000, 163840)
#: Contexts that a chart marks when none are asked for, of those below.
_MARKED = (1024, 64512, 128000)


@dataclass(frozen=True)
class ModelSize:
    """How large a model is.

    Attributes:
        parameters, active_parameters: how many there are, and how many one token meets.
        checkpoint_bytes: as it is downloaded.
        weight_bytes: bytes on one GPU, by precision.
        cache_bytes_per_token: bytes in the format of the caches.
    """

    parameters: int
    active_parameters: int
    checkpoint_bytes: int
    weight_bytes: Mapping[Precision, int]
    cache_bytes_per_token: int


@dataclass(frozen=True)
class PlanResult:
    """The answers of a plan.

    Attributes:
        config: the model.
        model: how large it is.
        answers: one for each precision, target and context, in that order. `found` is None where no number of GPUs
            does, else the layout, the memory of its fullest GPU by part, the bounds of speed, and whether it `fits`.
        kv_cache_dtype: format of the caches.
        mtp: whether the MTP module is there.
        goal: what layouts are ranked for; None: they are not.
        rankings: one for each answer, where there is a goal: the layouts that hold it, the best first.
    """

    config: ModelConfig
    model: ModelSize
    answers: tuple[Row, ...]
    kv_cache_dtype: KvFormat
    mtp: bool
    goal: Goal | None = None
    rankings: tuple[tuple[Ranked, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what `seekforge plan --json` prints."""
        answers = [_json(row, self.config) for row in self.answers]
        for facts, ranking in zip(answers, self.rankings):
            facts["ranking"] = [_ranked_json(one) for one in ranking]
        whole = {"model": asdict(self.model), "answers": answers}
        return whole if self.goal is None else whole | {"goal": self.goal, "assumptions": asdict(ASSUMED)}


@public
def plan(
    model: Source,
    *,
    target: Sources = (),
    num_gpus: Count | None = None,
    tp: Count | None = None,
    pp: Count | None = None,
    dp: Count | None = None,
    ep: Flag = False,
    contexts: Counts = (),
    batch_size: Count = 1,
    precision: Precisions = (),
    kv_cache_dtype: Literal["fp8_ds", "bf16"] | None = None,
    mtp: Flag = False,
    goal: Literal["latency", "throughput"] | None = None,
    chart: AnyPath | None = None,
) -> PlanResult:
    """Say which GPUs, and how many, a model needs, for which contexts and batches, and how fast they can be at best.

    Args:
        model: a checkpoint folder, a config.json, a Hugging Face repository (of which config.json is read), or a name
            of configs/models, such as "full".
        target: GPUs of `seekforge targets`, or YAML files; none: all.
        num_gpus: exactly so many; None: the fewest that fit.
        tp, pp, dp: tensor-parallel ranks, pipeline stages, replicas of the whole model.
        ep: with expert parallelism: experts dealt out whole among the tensor-parallel ranks.
        contexts: tokens of a sequence; none: 1K to 160K.
        batch_size: sequences at once.
        precision: those of weights: "fp8", "bf16", "nvfp4" (experts in NVFP4, for SMs from 100 on); none:
            the first two.
        kv_cache_dtype: format of the caches; None: fp8_ds, or bf16 of a model whose attention does not read that.
        mtp: with the MTP module, drafting one token per step.
        goal: forecast a decode step of every layout that fits and rank them: "latency" for the shortest step,
            "throughput" for the most tokens per second of each GPU. `PlanResult.rankings` has them.
        chart: draw GPUs and memory into this .png or .svg; with a goal, the steps of the best layouts.

    Raises:
        OptionError: an argument is none that it takes.
        ConfigError, CheckpointError: there is no such model, or it cannot do what was asked.
        TargetError: a target is unknown or no GPU.
        OutputError: the chart cannot be written.
        EnvironmentFault: matplotlib is not installed.
    """
    name, place = str(model), None if chart is None else Path(chart)
    if place is not None:
        check_chart(place)
    config = read_config(name)
    named = many(contexts)
    lengths = within(named, config) or [one for one in _CONTEXTS if one <= config.max_position_embeddings]
    wanted: tuple[Precision, ...] = tuple(many(precision)) or ("fp8", "bf16")
    least = NVFP4_SM if "nvfp4" in wanted else 0
    targets = [load_target(str(one)) for one in many(target)] or [
        one for one in all_targets() if one.gpu is not None and (one.sm or 0) >= least
    ]
    for one in targets:
        if one.gpu is None:
            raise TargetError(f"target {one.name} is no GPU; 'seekforge plan' sizes GPUs")
        if (one.sm or 0) < least:
            raise TargetError(
                f"target {one.name} is of sm {one.sm}, precision nvfp4 is for SMs from {least} on; leave one out"
            )
    if mtp and config.mtp_layer is None:
        raise ConfigError(f"{name}: has no MTP module (num_nextn_predict_layers is 0); leave --mtp out")
    kv_format = _kv_format(name, config, kv_cache_dtype)
    layout = _layout(tp, pp, dp, num_gpus, config, ep=ep)
    rows: list[Row] = []
    for question in [Question(one, kv_format, mtp, ep) for one in wanted]:
        for one in targets:
            for length in lengths or [config.max_position_embeddings]:
                work = Workload(length, batch_size, one.limits.max_num_batched_tokens, 1 if mtp else 0)
                rows.append(Row(question, one, work, _answer(config, one, work, question, layout, num_gpus)))
    rankings: list[tuple[Ranked, ...]] = []
    if goal is not None:
        if layout is not None:
            raise ConfigError("--goal looks for a layout, and --tp, --pp or --dp give one; leave one of them out")
        for row in rows:
            ranked = rank_layouts(config, row.target, row.work, row.question, goal, num_gpus)
            rankings.append(tuple(ranked))
    if place is not None and goal is not None:
        write_ranking_chart(place, Path(name).name, rows, rankings, goal)
    elif place is not None:
        marked = lengths if named else [one for one in _MARKED if one in lengths] or lengths
        write_plan_chart(place, config, rows, model=Path(name).name, marked=marked)
    size = ModelSize(
        parameters=num_parameters(config, mtp=mtp),
        active_parameters=active_parameters(config),
        checkpoint_bytes=checkpoint_bytes(config),
        weight_bytes={
            one: weight_bytes(config, mtp=mtp, precision=one) for one in dict.fromkeys(("fp8", "bf16", *wanted))
        },
        cache_bytes_per_token=cache_bytes_per_token(config, kv_format, layers=all_layers(config, mtp=mtp)),
    )
    return PlanResult(config, size, tuple(rows), kv_format, mtp, goal, tuple(rankings))


def _kv_format(name: str, config: ModelConfig, wanted: Literal["fp8_ds", "bf16"] | None) -> KvFormat:
    formats = family_of(config).kv_formats
    if wanted is not None and wanted not in formats:
        raise ConfigError(
            f"{name}: the caches of a {config.model_type} model are {' or '.join(formats)} on GPUs, "
            f"--kv-cache-dtype is {wanted}; leave it out"
        )
    return wanted or formats[0]


def read_config(model: str) -> ModelConfig:
    """Return the config of a folder, a config.json, a repository of the hub, or a name of configs/models.

    Raises:
        ConfigError: nothing of that name, or not a model that seekforge does.
    """
    path = Path(model)
    if path.exists():
        return ModelConfig.load(path)
    if parse_repo(model) is not None:
        with headers(model, config_only=True) as folder:
            return ModelConfig.load(folder)
    raw = load_yaml("models", model)
    if raw is None:
        raise ConfigError(
            f"{model}: neither a folder, nor a config.json, nor a name of configs/models "
            f"({', '.join(known('models'))}), nor a Hugging Face repository (OWNER/NAME)"
        )
    return ModelConfig.parse(raw["config"], f"configs/models/{model}.yaml")


def within(contexts: Iterable[int], config: ModelConfig) -> list[int]:
    """Return contexts in ascending order, each once.

    Raises:
        ConfigError: one is longer than the model can.
    """
    most = config.max_position_embeddings
    for context in contexts:
        if context > most:
            raise ConfigError(
                f"--contexts {tokens(context)}: the model ends at {most} tokens ({tokens(most)}, "
                "max_position_embeddings)"
            )
    return sorted(set(contexts))


def _layout(
    tp: int | None, pp: int | None, dp: int | None, num_gpus: int | None, config: ModelConfig, *, ep: bool
) -> Parallelism | None:
    if tp is None and dp is None and pp is None:
        return None
    layout = Parallelism(tp=tp or 1, pp=pp or 1, dp=dp or 1, ep=ep)
    check_parallelism(config, layout)
    if num_gpus not in (None, layout.num_gpus):
        raise ConfigError(f"{layout} is {layout.num_gpus} GPUs, --num-gpus says {num_gpus}; leave one of them out")
    return layout


def _answer(
    config: ModelConfig,
    target: TargetConfig,
    work: Workload,
    question: Question,
    layout: Parallelism | None,
    num_gpus: int | None,
) -> Answer | None:
    if layout is not None:
        return answer(config, target, layout, work, question)
    if num_gpus is not None:
        return best(config, target, num_gpus, work, question)
    return fewest(config, target, work, question)


def _ranked_json(one: Ranked) -> dict[str, Any]:
    made = one.forecast
    facts = {"num_gpus": one.parallelism.num_gpus, **one.parallelism.model_dump()}
    facts |= {"export_options": one.parallelism.options, "parts_ms": {part: getattr(made, part) for part in PARTS}}
    return facts | {
        "step_ms": made.step_ms,
        "tokens_per_s": made.tokens_per_s,
        "tokens_per_gpu_s": made.tokens_per_gpu_s,
    }


def _json(row: Row, config: ModelConfig) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "target": row.target.name,
        "precision": row.question.precision,
        "kv_cache_dtype": row.question.kv_format,
        "mtp": row.question.mtp,
        "context": row.work.context,
        "batch": row.work.batch,
        "fits": row.fits,
    }
    result = row.found
    if result is None:
        return facts
    return facts | {
        "num_gpus": result.parallelism.num_gpus,
        **result.parallelism.model_dump(),
        "export_options": result.parallelism.options,
        "divides_vocabulary": result.parallelism.divides_vocabulary(config),
        "bytes_per_gpu": asdict(result.memory) | {"total": result.memory.total, "usable": result.usable},
        "max_context": result.max_context,
        "max_batch": result.max_batch,
        "bounds": asdict(result.speed),
    }
