"""`seekforge plan`: the memory calculator."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from seekforge.exporter.build.targets import TargetConfig, all_targets, load_target
from seekforge.exporter.configs import known, load_yaml
from seekforge.exporter.plan.answer import GPU_COUNTS, Answer, Question, answer, best, fewest
from seekforge.plugins.charts import Line, Panel, check_chart, tokens, write_charts
from seekforge.plugins.errors import ConfigError, TargetError
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.sizing import (
    GIB,
    Layout,
    Workload,
    active_parameters,
    cache_bytes_per_token,
    checkpoint_bytes,
    fault_of,
    num_parameters,
    rank_memory,
    weight_bytes,
)

_CONTEXTS = "1K,8K,32K,63K,125K,160K"


@click.command("plan")
@click.argument("model", type=str)
@click.option("--target", "names", multiple=True, help="A GPU of 'seekforge targets', or a YAML file. Default: all.")
@click.option("--num-gpus", type=click.IntRange(1), default=None, help="Exactly so many. Default: the fewest that fit.")
@click.option("--tp", type=click.IntRange(1), default=None, help="Tensor parallel ranks (with --target).")
@click.option("--dp", type=click.IntRange(1), default=None, help="Attention replicas; experts over all of them.")
@click.option("--pp", type=click.IntRange(1), default=None, help="Pipeline stages.")
@click.option("--context", default=_CONTEXTS, show_default=True, help="Tokens of a sequence; several with commas.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option(
    "--precision", "precisions", type=click.Choice(["fp8", "bf16"]), multiple=True, help="Of weights. Default: both."
)
@click.option(
    "--kv-cache-dtype", type=click.Choice(["fp8_ds", "bf16"]), default="fp8_ds", show_default=True, help="Of the cache."
)
@click.option("--mtp", is_flag=True, help="With the MTP module, drafting one token per step.")
@click.option("--chart", type=click.Path(path_type=Path), default=None, help="Draw memory over context: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    model: str,
    *,
    names: tuple[str, ...],
    num_gpus: int | None,
    tp: int | None,
    dp: int | None,
    pp: int | None,
    context: str,
    batch: int,
    precisions: tuple[str, ...],
    kv_cache_dtype: str,
    mtp: bool,
    chart: Path | None,
    as_json: bool,
) -> None:
    """Say which GPUs, and how many, MODEL needs, for which contexts and batches, and how fast they can be at best.

    MODEL is a checkpoint folder, a config.json, or a name of configs/models, such as full.
    """
    if chart is not None:
        check_chart(chart)
    config = read_config(model)
    contexts = [parse_tokens(part, config) for part in context.split(",") if part.strip()]
    targets = [load_target(name) for name in names] or [target for target in all_targets() if target.gpu is not None]
    for target in targets:
        if target.gpu is None:
            raise TargetError(f"target {target.name} is no GPU; 'seekforge plan' sizes GPUs")
    if mtp and config.mtp_layer is None:
        raise ConfigError(f"{model}: has no MTP module (num_nextn_predict_layers is 0); leave --mtp out")
    layout = _layout(tp, dp, pp, num_gpus, config)
    questions = [
        Question(precision, kv_cache_dtype, mtp)  # pyright: ignore[reportArgumentType]
        for precision in precisions or ("fp8", "bf16")
    ]
    rows = []
    for question in questions:
        for target in targets:
            for length in contexts:
                work = Workload(length, batch, target.limits.max_num_batched_tokens, 1 if mtp else 0)
                rows.append((question, target, length, _answer(config, target, work, question, layout, num_gpus)))
    if chart is not None:
        _write_chart(chart, config, model, targets, questions[0], batch, layout, num_gpus)
    if as_json:
        click.echo(json.dumps(_json(config, rows, batch, kv_cache_dtype), indent=1))
    else:
        _print(config, rows, batch, kv_cache_dtype, mtp=mtp)
        if chart is not None:
            click.echo(f"wrote {chart}")


def read_config(model: str) -> ModelConfig:
    """Return the config of a folder, a config.json, or a name of configs/models.

    Raises:
        ConfigError: nothing of that name, or not a model that seekforge does.
    """
    path = Path(model)
    if path.exists():
        return ModelConfig.load(path)
    raw = load_yaml("models", model)
    if raw is None:
        raise ConfigError(
            f"{model}: neither a folder, nor a config.json, nor a name of configs/models ({', '.join(known('models'))})"
        )
    return ModelConfig.parse(raw["config"], f"configs/models/{model}.yaml")


def parse_tokens(text: str, config: ModelConfig) -> int:
    """Return a number of tokens from `131072` or `128K`.

    Raises:
        ConfigError: not such a number, or more than the model can.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--context {text!r}: expected tokens such as 131072 or 128K")
    count = int(match[1]) * (1024 if match[2] else 1)
    if count > config.max_position_embeddings:
        raise ConfigError(
            f"--context {text.strip()}: the model ends at {config.max_position_embeddings} tokens "
            f"({tokens(config.max_position_embeddings)}, max_position_embeddings)"
        )
    return count


def _layout(tp: int | None, dp: int | None, pp: int | None, num_gpus: int | None, config: ModelConfig) -> Layout | None:
    if tp is None and dp is None and pp is None:
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


Row = tuple[Question, TargetConfig, int, Answer | None]


def _json(config: ModelConfig, rows: list[Row], batch: int, kv_format: str) -> dict[str, Any]:
    return {
        "model": {
            "parameters": num_parameters(config),
            "active_parameters": active_parameters(config),
            "checkpoint_bytes": checkpoint_bytes(config),
            "weight_bytes": {p: weight_bytes(config, precision=p) for p in ("fp8", "bf16")},
            "cache_bytes_per_token": cache_bytes_per_token(config, kv_format),  # pyright: ignore[reportArgumentType]
        },
        "answers": [
            {
                "target": target.name,
                "precision": question.precision,
                "kv_cache_dtype": question.kv_format,
                "mtp": question.mtp,
                "context": context,
                "batch": batch,
                "fits": found is not None and found.fits,
                **(
                    {}
                    if found is None
                    else {
                        "num_gpus": found.layout.num_gpus,
                        "tp": found.layout.tp,
                        "dp": found.layout.dp,
                        "pp": found.layout.pp,
                        "bytes_per_gpu": asdict(found.memory) | {"total": found.memory.total, "usable": found.usable},
                        "max_context": found.max_context,
                        "max_batch": found.max_batch,
                        "bounds": asdict(found.speed),
                    }
                ),
            }
            for question, target, context, found in rows
        ],
    }


def _print(config: ModelConfig, rows: list[Row], batch: int, kv_format: str, *, mtp: bool) -> None:
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    per_token = cache_bytes_per_token(config, kv_format)  # pyright: ignore[reportArgumentType]
    console.print(
        f"{num_parameters(config) / 1e9:.2f} B parameters, {active_parameters(config) / 1e9:.2f} B active per token, "
        f"checkpoint {checkpoint_bytes(config) / GIB:.1f} GiB; weights on one GPU: FP8 "
        f"{weight_bytes(config, mtp=mtp) / GIB:.1f} GiB, BF16 "
        f"{weight_bytes(config, mtp=mtp, precision='bf16') / GIB:.1f} GiB; cache {kv_format}: {per_token:,} B per token"
    )
    for precision in dict.fromkeys(question.precision for question, *_ in rows):
        table = Table(
            title=f"weights in {precision.upper()}, batch {batch}" + (", with MTP" if mtp else ""),
            title_justify="left",
            caption="GiB on the fullest GPU; speeds are upper bounds from bandwidth and FLOPs, all sequences together",
            caption_justify="left",
        )
        for name in ("GPU", "context", "GPUs", "as", "weights", "cache", "other", "of"):
            table.add_column(name, justify="left" if name in ("GPU", "as") else "right")
        for name in ("max context", "max batch", "decode tok/s", "prefill tok/s"):
            table.add_column(name, justify="right")
        before = ""
        for question, target, context, found in rows:
            if question.precision != precision:
                continue
            name = target.name if target.name != before else ""
            before = target.name
            table.add_row(name, tokens(context), *_cells(found), end_section=context == rows[-1][2])
        console.print(table)


def _cells(found: Answer | None) -> tuple[str, ...]:
    if found is None:
        return (f"> {GPU_COUNTS[-1]}", *[""] * 9)
    memory = found.memory
    other = memory.scratch + memory.activations + memory.reserve
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


def _write_chart(
    path: Path,
    config: ModelConfig,
    model: str,
    targets: list[TargetConfig],
    question: Question,
    batch: int,
    layout: Layout | None,
    num_gpus: int | None,
) -> None:
    """Memory of one GPU over context: a line per target, at its number of GPUs for the longest context."""
    longest = config.max_position_embeddings
    marks = [2**power for power in range(10, longest.bit_length()) if 2**power < longest] + [longest]
    lines, limits = [], {}
    for target in targets:
        assert target.gpu is not None
        work = Workload(longest, batch, target.limits.max_num_batched_tokens, 1 if question.mtp else 0)
        found = _answer(config, target, work, question, layout, num_gpus)
        if found is None:
            continue
        points = tuple(
            (
                float(length),
                rank_memory(
                    config,
                    found.layout,
                    Workload(length, batch, work.step_tokens, work.draft_tokens),
                    precision=question.precision,
                    kv_format=question.kv_format,
                    mtp=question.mtp,
                ).total
                / GIB,
            )
            for length in marks
        )
        lines.append(Line(f"{found.layout.num_gpus} × {target.name}, {found.layout}", points))
        limits[f"{target.name}: {found.usable / GIB:.0f} GiB"] = found.usable / GIB
    if not lines:
        raise TargetError(f"nothing to draw: no number of GPUs up to {GPU_COUNTS[-1]} holds {longest} tokens")
    title = f"{Path(model).name}: memory per GPU, weights {question.precision.upper()}, batch {batch}"
    panel = Panel(title, "context (tokens)", "GiB on the fullest GPU", tuple(lines), tuple(limits.items()))
    write_charts(path, [panel])
