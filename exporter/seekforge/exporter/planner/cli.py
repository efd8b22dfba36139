"""`seekforge plan`: the memory calculator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click

from seekforge.common.cli.charts import tokens
from seekforge.common.cli.console import Column, Table, console
from seekforge.common.cli.options import (
    Whole,
    command,
    contexts_option,
    json_option,
    kv_cache_dtype_option,
    list_option,
)
from seekforge.common.cli.terminal import echo, typed, typed_command, write_json
from seekforge.exporter.checkpoint.source import parse_repo
from seekforge.exporter.models.sharding import whole_vocabulary
from seekforge.exporter.option_types import MODEL, TARGET
from seekforge.exporter.planner import api
from seekforge.exporter.planner.answer import GPU_COUNTS, Answer
from seekforge.exporter.planner.api import PlanResult
from seekforge.exporter.planner.chart import Row
from seekforge.exporter.planner.forecast import ASSUMED
from seekforge.exporter.planner.ranking_chart import MOST, PARTS
from seekforge.exporter.sizing.matrices import Precision
from seekforge.exporter.sizing.memory import GIB, RankMemory
from seekforge.formats.checkpoint.model_config import ModelConfig

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
        "seekforge plan full --target h200 --contexts 8K --batch-size 32 --goal latency",
    ),
    function=api.plan,
)
@click.argument("model", type=MODEL)
@list_option("--target", type=TARGET, help="GPUs of 'seekforge targets', or YAML files. Default: all.")
@click.option("--num-gpus", type=Whole(1), help="Exactly so many. Default: the fewest that fit.")
@click.option("--tp", type=Whole(1), help="Tensor-parallel ranks.")
@click.option("--pp", type=Whole(1), help="Pipeline stages.")
@click.option("--dp", type=Whole(1), help="Replicas of the whole model.")
@click.option("--ep", is_flag=True, help="Expert parallelism: experts dealt out whole among the tensor-parallel ranks.")
@contexts_option("Tokens of a sequence. Default: 1K to 160K.")
@click.option("--batch-size", type=Whole(1), default=1, show_default=True, help="Sequences at once.")
@list_option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    metavar="fp8,bf16",
    help="Of weights; nvfp4: experts in NVFP4, on SMs from 100 on. Default: fp8 and bf16.",
)
@kv_cache_dtype_option("Format of the caches. Default: fp8_ds where the model's attention reads it, else bf16.")
@click.option("--mtp", is_flag=True, help="With the MTP module, drafting one token per step.")
@click.option(
    "--goal",
    type=click.Choice(["latency", "throughput"]),
    help="Forecast a decode step of every layout that fits, and rank them.",
)
@click.option("--chart", type=click.Path(path_type=Path), default=None, help="Draw GPUs and memory: .png or .svg.")
@click.option("--all", "everything", is_flag=True, help="Without --target too: every context, both precisions.")
@json_option
def plan(model: str, *, everything: bool, as_json: bool, **options: Any) -> None:
    """Say which GPUs, and how many, MODEL needs, for which contexts and batches, and how fast they can be at best.

    MODEL is a checkpoint folder, a config.json, a Hugging Face repository (of which config.json is read), or a name of
    configs/models, such as full.

    Without --target it prints one line per GPU: the fewest of them that hold the longest context. --json always gives
    every answer. Behind it stands, for each layout that fits, the command that exports it.

    With --goal it forecasts a decode step from bytes, launches and sums over ranks, says what it assumes, and ranks the
    layouts: for latency the shortest step comes first, for throughput the most tokens per second of each GPU.
    """
    result = api.plan(model, **options)
    if as_json:
        write_json(result.to_json(), indent=1)
        return
    if result.goal is not None:
        _print_rankings(result)
        if options["chart"] is not None:
            echo(f"wrote {options['chart']}")
        return
    if options["target"] or options["contexts"] or everything:
        _print(result)
        rows = result.answers
    else:
        first, longest = result.answers[0].question.precision, max(row.work.context for row in result.answers)
        of_precision = [row for row in result.answers if options["precision"] or row.question.precision == first]
        rows = [row for row in of_precision if row.work.context == longest]
        _print_best(result, rows)
    for line in _export_commands(model, result.config, rows):
        echo(line)
    if options["chart"] is not None:
        echo(f"wrote {options['chart']}")


def _export_commands(model: str, config: ModelConfig, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the command that makes the program of each layout that fits, once, and what its ranks cannot divide."""
    checkpoint = model if Path(model).is_dir() or parse_repo(model) is not None else "CHECKPOINT"
    for layout in dict.fromkeys(row.found.parallelism for row in rows if row.found is not None and row.found.fits):
        yield f"{layout}: {typed_command('export', typed(checkpoint), 'PROGRAM', *layout.options.split())}"
        whole = whole_vocabulary(config, layout)
        if whole is not None:
            yield f"{layout}: {whole}"


def _summary(result: PlanResult) -> str:
    model = result.model
    return (
        f"{model.parameters / 1e9:.2f} B parameters{' with MTP' if result.mtp else ''}, "
        f"{model.active_parameters / 1e9:.2f} B active per token, "
        f"checkpoint {model.checkpoint_bytes / GIB:.1f} GiB; weights on one GPU: FP8 "
        f"{model.weight_bytes['fp8'] / GIB:.1f} GiB, BF16 {model.weight_bytes['bf16'] / GIB:.1f} GiB; "
        f"cache {result.kv_cache_dtype}: {model.cache_bytes_per_token:,} B per token"
    )


def _print_best(result: PlanResult, rows: Sequence[Row]) -> None:
    """Print one line per GPU and precision: what the longest context takes."""
    longest = rows[0].work.context
    out = console()
    out.print(_summary(result))
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
        gpus, layout, *_ = cells = _cells(row.found)
        total = "" if row.found is None else f"{row.found.memory.total / GIB:.1f}"
        precision = [row.question.precision] if several else []
        table.add(row.target.name, *precision, gpus, layout, total, cells[5], *cells[7:])
    out.print(table)


def _print(result: PlanResult) -> None:
    rows, mtp = result.answers, result.mtp
    out = console()
    out.print(_summary(result))
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


def _print_rankings(result: PlanResult) -> None:
    out = console()
    out.print(_summary(result))
    accepted = ", every draft accepted" if result.mtp else ""
    for row, ranking in zip(result.answers, result.rankings, strict=True):
        columns = [
            Column("layout", "code"),
            *(Column(name, "number") for name in ("GPUs", "step ms", "tok/s", "per GPU")),
        ]
        columns += [Column(name, "number") for name in PARTS]
        title = (
            f"{row.target.name}, {row.question.precision}, {tokens(row.work.context)} tokens of context, batch "
            f"{row.work.batch}, for {result.goal}"
        )
        table = Table(columns, title=title, caption=f"on paper, ms; assumed: {ASSUMED}{accepted}")
        for one in ranking[:MOST]:
            made = one.forecast
            parts = [f"{getattr(made, part):.2f}" for part in PARTS]
            rates = (f"{made.step_ms:.1f}", f"{made.tokens_per_s:,.0f}", f"{made.tokens_per_gpu_s:,.0f}")
            table.add(str(one.parallelism), str(one.parallelism.num_gpus), *rates, *parts)
        out.print(table if ranking else f"{title}: no layout holds it")


def _cells(answer: Answer | None) -> tuple[str, ...]:
    if answer is None:
        return (f"> {GPU_COUNTS[-1]}", *[""] * 9)
    memory = answer.memory
    other = memory.total - memory.weights - memory.cache
    sizes = [f"{size / GIB:.1f}" for size in (memory.weights, memory.cache, other, answer.usable)]
    if not answer.fits:
        over = f"{(memory.total - answer.usable) / GIB:.1f} GiB over"
        return (
            str(answer.parallelism.num_gpus),
            f"{answer.parallelism}: {over}",
            *sizes,
            tokens(answer.max_context),
            "0",
            "",
            "",
        )
    return (
        str(answer.parallelism.num_gpus),
        str(answer.parallelism),
        *sizes,
        tokens(answer.max_context),
        f"{answer.max_batch:,}",
        f"{answer.speed.decode_tokens_per_s:,.0f}",
        f"{answer.speed.prefill_tokens_per_s:,.0f}",
    )


def _breakdown(rows: Sequence[Row]) -> Table:
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
