"""`seekforge plan`: the memory calculator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from seekforge.common.cli.charts import check_chart, tokens
from seekforge.common.cli.console import Column, Table, console
from seekforge.common.cli.options import (
    Whole,
    command,
    contexts_option,
    json_option,
    kv_cache_dtype_option,
    list_option,
)
from seekforge.common.cli.terminal import echo, write_json
from seekforge.common.configs import known, load_yaml
from seekforge.common.errors import ConfigError, TargetError
from seekforge.exporter.checkpoint.source import headers, parse_repo
from seekforge.exporter.option_types import MODEL, TARGET
from seekforge.exporter.planner.answer import GPU_COUNTS, Answer, Question, answer, best, fewest, nearest_count
from seekforge.exporter.planner.chart import Row, write_plan_chart
from seekforge.exporter.sizing.memory import (
    GIB,
    KvFormat,
    Layout,
    Precision,
    RankMemory,
    Workload,
    active_parameters,
    cache_bytes_per_token,
    checkpoint_bytes,
    fault_of,
    num_parameters,
    weight_bytes,
)
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.targets import TargetConfig, all_targets, load_target

_CONTEXTS = (1024, 8192, 32768, 64512, 128000, 163840)
#: Contexts that a chart marks when none are asked for, of those below.
_MARKED = (1024, 64512, 128000)
#: Columns of a breakdown, by the parts of `RankMemory`.
_PARTS = {
    "weights": "weights",
    "cache": "cache",
    "indexer_scores": "indexer scores",
    "scratch": "other scratch",
    "activations": "activations",
    "graphs": "CUDA graphs",
    "cuda_context": "CUDA context",
    "communication": "communication",
}


@command(
    "plan",
    examples=(
        "seekforge plan full",
        "seekforge plan full --target h200,b200 --contexts 63K,125K --batch-size 32",
        "seekforge plan checkpoint/config.json --target rtx4090 --tp 8 --pp 6 --json",
    ),
)
@click.argument("model", type=MODEL)
@list_option("--target", "names", type=TARGET, help="GPUs of 'seekforge targets', or YAML files. Default: all.")
@click.option("--num-gpus", type=Whole(1), help="Exactly so many. Default: the fewest that fit.")
@click.option("--tp", type=Whole(1), help="Tensor parallel ranks (with --target).")
@click.option("--dp", type=Whole(1), help="Attention replicas; experts over all of them.")
@click.option("--pp", type=Whole(1), help="Pipeline stages.")
@contexts_option("Tokens of a sequence. Default: 1K to 160K.")
@click.option("--batch-size", type=Whole(1), default=1, show_default=True, help="Sequences at once.")
@list_option(
    "--precision",
    "precisions",
    type=click.Choice(["fp8", "bf16"]),
    metavar="fp8,bf16",
    help="Of weights. Default: both.",
)
@kv_cache_dtype_option("Format of the caches.", default="fp8_ds")
@click.option("--mtp", is_flag=True, help="With the MTP module, drafting one token per step.")
@click.option("--chart", type=click.Path(path_type=Path), default=None, help="Draw GPUs and memory: .png or .svg.")
@click.option("--all", "everything", is_flag=True, help="Without --target too: every context, both precisions.")
@json_option
def plan(
    model: str,
    *,
    names: tuple[str, ...],
    num_gpus: int | None,
    tp: int | None,
    dp: int | None,
    pp: int | None,
    contexts: tuple[int, ...],
    batch_size: int,
    precisions: tuple[Precision, ...],
    kv_cache_dtype: KvFormat,
    mtp: bool,
    chart: Path | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Say which GPUs, and how many, MODEL needs, for which contexts and batches, and how fast they can be at best.

    MODEL is a checkpoint folder, a config.json, a Hugging Face repository (of which config.json is read), or a name of
    configs/models, such as full.

    Without --target it prints one line per GPU: the fewest of them that hold the longest context. --json always gives
    every answer.
    """
    if chart is not None:
        check_chart(chart)
    config = read_config(model)
    lengths = within(contexts, config) or [one for one in _CONTEXTS if one <= config.max_position_embeddings]
    targets = [load_target(name) for name in dict.fromkeys(names)] or [
        target for target in all_targets() if target.gpu is not None
    ]
    for target in targets:
        if target.gpu is None:
            raise TargetError(f"target {target.name} is no GPU; 'seekforge plan' sizes GPUs")
    if mtp and config.mtp_layer is None:
        raise ConfigError(f"{model}: has no MTP module (num_nextn_predict_layers is 0); leave --mtp out")
    layout = _layout(tp, dp, pp, num_gpus, config)
    wanted: Iterable[Precision] = dict.fromkeys(precisions) or ("fp8", "bf16")
    questions = [Question(precision, kv_cache_dtype, mtp) for precision in wanted]
    rows: list[Row] = []
    for question in questions:
        for target in targets:
            for length in lengths or [config.max_position_embeddings]:
                work = Workload(length, batch_size, target.limits.max_num_batched_tokens, 1 if mtp else 0)
                found = _answer(config, target, work, question, layout, num_gpus)
                rows.append(Row(question, target, work, found))
    if chart is not None:
        marked = lengths if contexts else [one for one in _MARKED if one in lengths] or lengths
        write_plan_chart(chart, config, rows, model=Path(model).name, marked=marked)
    if as_json:
        write_json(_json(config, rows, kv_cache_dtype, mtp=mtp), indent=1)
        return
    if names or everything or contexts:
        _print(config, rows, kv_cache_dtype, mtp=mtp)
    else:
        _print_best([row for row in rows if precisions or row.question.precision == questions[0].precision], config)
    if chart is not None:
        echo(f"wrote {chart}")


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


def _layout(tp: int | None, dp: int | None, pp: int | None, num_gpus: int | None, config: ModelConfig) -> Layout | None:
    if tp is None and dp is None and pp is None:
        if num_gpus is not None and (nearest := nearest_count(num_gpus, config)) != num_gpus:
            raise ConfigError(f"--num-gpus {num_gpus}: no layout has so many GPUs; the nearest count is {nearest}")
        return None
    layout = Layout(tp or 1, dp or 1, pp or 1)
    fault = fault_of(layout, config)
    if fault is not None:
        raise ConfigError(f"{layout}: {fault}; choose other --tp, --dp or --pp")
    if num_gpus not in (None, layout.num_gpus):
        raise ConfigError(f"{layout} is {layout.num_gpus} GPUs, --num-gpus says {num_gpus}; leave one of them out")
    return layout


def _answer(
    config: ModelConfig,
    target: TargetConfig,
    work: Workload,
    question: Question,
    layout: Layout | None,
    num_gpus: int | None,
) -> Answer | None:
    if layout is not None:
        return answer(config, target, layout, work, question)
    if num_gpus is not None:
        return best(config, target, num_gpus, work, question)
    return fewest(config, target, work, question)


def _json(config: ModelConfig, rows: list[Row], kv_format: KvFormat, *, mtp: bool) -> dict[str, Any]:
    return {
        "model": {
            "parameters": num_parameters(config, mtp=mtp),
            "active_parameters": active_parameters(config),
            "checkpoint_bytes": checkpoint_bytes(config),
            "weight_bytes": {p: weight_bytes(config, mtp=mtp, precision=p) for p in ("fp8", "bf16")},
            "cache_bytes_per_token": _cache_bytes_per_token(config, kv_format, mtp=mtp),
        },
        "answers": [
            {
                "target": row.target.name,
                "precision": row.question.precision,
                "kv_cache_dtype": row.question.kv_format,
                "mtp": row.question.mtp,
                "context": row.work.context,
                "batch": row.work.batch,
                "fits": row.found is not None and row.found.fits,
                **({} if row.found is None else _json_found(row.found)),
            }
            for row in rows
        ],
    }


def _json_found(found: Answer) -> dict[str, Any]:
    return {
        "num_gpus": found.layout.num_gpus,
        "tp": found.layout.tp,
        "dp": found.layout.dp,
        "pp": found.layout.pp,
        "bytes_per_gpu": asdict(found.memory) | {"total": found.memory.total, "usable": found.usable},
        "max_context": found.max_context,
        "max_batch": found.max_batch,
        "bounds": asdict(found.speed),
    }


def _cache_bytes_per_token(config: ModelConfig, kv_format: KvFormat, *, mtp: bool) -> int:
    return cache_bytes_per_token(config, kv_format, num_layers=config.num_hidden_layers + mtp)


def _summary(config: ModelConfig, kv_format: KvFormat, *, mtp: bool) -> str:
    return (
        f"{num_parameters(config, mtp=mtp) / 1e9:.2f} B parameters{' with MTP' if mtp else ''}, "
        f"{active_parameters(config) / 1e9:.2f} B active per token, "
        f"checkpoint {checkpoint_bytes(config) / GIB:.1f} GiB; weights on one GPU: FP8 "
        f"{weight_bytes(config, mtp=mtp) / GIB:.1f} GiB, BF16 "
        f"{weight_bytes(config, mtp=mtp, precision='bf16') / GIB:.1f} GiB; cache {kv_format}: "
        f"{_cache_bytes_per_token(config, kv_format, mtp=mtp):,} B per token"
    )


def _print_best(rows: list[Row], config: ModelConfig) -> None:
    """Print one line per GPU and precision: what the longest context takes."""
    longest = max(row.work.context for row in rows)
    question = rows[0].question
    out = console()
    out.print(_summary(config, question.kv_format, mtp=question.mtp))
    columns = [Column("GPU", "code"), Column("GPUs", "number"), Column("as", "code")]
    columns += [Column(name, "number") for name in ("GiB of each", "of", "max batch", "decode tok/s", "prefill tok/s")]
    several = len({row.question.precision for row in rows}) > 1
    table = Table(
        columns if not several else [columns[0], Column("weights", "code"), *columns[1:]],
        title=f"the fewest GPUs for {tokens(longest)} tokens of context, batch {rows[0].work.batch}, weights in "
        f"{' and '.join(dict.fromkeys(row.question.precision.upper() for row in rows))}",
        caption="tok/s are upper bounds from bandwidth and FLOPs; --all prints every context and both precisions, "
        "--target NAME also what fills its memory",
    )
    for row in rows:
        if row.work.context != longest:
            continue
        gpus, layout, *_ = cells = _cells(row.found)
        total = "" if row.found is None else f"{row.found.memory.total / GIB:.1f}"
        precision = [row.question.precision] if several else []
        table.add(row.target.name, *precision, gpus, layout, total, cells[5], *cells[7:])
    out.print(table)


def _print(config: ModelConfig, rows: list[Row], kv_format: KvFormat, *, mtp: bool) -> None:
    out = console()
    out.print(_summary(config, kv_format, mtp=mtp))
    caption = (
        "GiB on the fullest GPU; tok/s are upper bounds from bandwidth and FLOPs, if experts are chosen evenly: decode "
        f"of all sequences{', if every draft is accepted' if mtp else ''}; prefill in steps full of prompts"
    )
    for precision in dict.fromkeys(row.question.precision for row in rows):
        of_precision = [row for row in rows if row.question.precision == precision]
        title = f"weights in {precision.upper()}, batch {rows[0].work.batch}{', with MTP' if mtp else ''}"
        columns = [Column("GPU", "code"), Column("context", "number"), Column("GPUs", "number"), Column("as")]
        columns += [Column(name, "number") for name in ("weights", "cache", "other", "of", "max context", "max batch")]
        columns += [Column(name, "number") for name in ("decode tok/s", "prefill tok/s")]
        table = Table(columns, title=title, caption=caption, lines=True)
        for row in of_precision:
            is_last = row.work.context == rows[-1].work.context
            table.add(row.target.name, tokens(row.work.context), *_cells(row.found), end_section=is_last)
        out.print(table)
        if len({row.target.name for row in rows}) == 1:
            out.print(_breakdown(of_precision))


def _cells(found: Answer | None) -> tuple[str, ...]:
    if found is None:
        return (f"> {GPU_COUNTS[-1]}", *[""] * 9)
    memory = found.memory
    other = memory.total - memory.weights - memory.cache
    sizes = [f"{size / GIB:.1f}" for size in (memory.weights, memory.cache, other, found.usable)]
    if not found.fits:
        over = f"{(memory.total - found.usable) / GIB:.1f} GiB over"
        return (str(found.layout.num_gpus), f"{found.layout}: {over}", *sizes, tokens(found.max_context), "0", "", "")
    return (
        str(found.layout.num_gpus),
        str(found.layout),
        *sizes,
        tokens(found.max_context),
        f"{found.max_batch:,}",
        f"{found.speed.decode_tokens_per_s:,.0f}",
        f"{found.speed.prefill_tokens_per_s:,.0f}",
    )


def _breakdown(rows: list[Row]) -> Table:
    """Every part of what one target's fullest GPU holds, per context."""
    caption = "GiB; 'other scratch' is what other operators need beyond the place of the scores, which they share"
    names = [part.name for part in fields(RankMemory)]
    columns = [Column(name, "number") for name in ("context", *(_PARTS[name] for name in names), "total", "of")]
    table = Table(columns, title="what fills that GPU", caption=caption, lines=True)
    for row in rows:
        if row.found is not None:
            memory = row.found.memory
            sizes = [*(getattr(memory, name) for name in names), memory.total, row.found.usable]
            table.add(tokens(row.work.context), *(f"{size / GIB:.2f}" for size in sizes))
    return table
