"""`seekforge bench`: measure an engine; a table on stdout, or JSON, and a chart if asked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from seekforge.common.cli.charts import Line, Panel, check_chart, write_charts
from seekforge.common.cli.console import Column, Stages, Table, console
from seekforge.common.cli.options import (
    Tokens,
    Whole,
    command,
    contexts_option,
    json_option,
    list_option,
    quiet_option,
    threads_option,
)
from seekforge.common.cli.terminal import write_json
from seekforge.runtime.bench import Point, host_overhead_ms, measure
from seekforge.runtime.cli.options import check_checkpoint, checkpoint_option, drafts_option, open_engine
from seekforge.runtime.sampling.params import SamplingParams


@command(
    "bench",
    examples=(
        "seekforge bench engine",
        "seekforge bench engine --concurrency 1,8,64 --contexts 1K,16K --max-tokens 128 --chart bench.svg",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path))
@list_option("--concurrency", type=Whole(1), default="1,4", help="Requests at a time.")
@contexts_option("Tokens of a prompt.", default="64,512")
@click.option("--max-tokens", type=Tokens(), default=32, show_default=True, help="Tokens that each generates.")
@drafts_option
@list_option("--host-batch-size", type=Whole(1), default="1,64,256", help="Batches for the host's cost.")
@checkpoint_option
@threads_option
@click.option("--chart", type=click.Path(path_type=Path, dir_okay=False), help="Draw what was measured: .png or .svg.")
@quiet_option
@json_option
def bench(
    engine: Path,
    concurrency: tuple[int, ...],
    contexts: tuple[int, ...],
    max_tokens: int,
    num_speculative_tokens: int,
    host_batch_size: tuple[int, ...],
    checkpoint: Path | None,
    threads: int | None,
    chart: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure ENGINE: throughput and latency over concurrency and context, cache hits, drafts, the host's own cost."""
    if chart is not None:
        check_chart(chart)
    stages = Stages(quiet=quiet or as_json)
    opened = open_engine(engine, stages)
    stages.stop()
    check_checkpoint(opened, checkpoint)
    limits = opened.manifest.limits
    if max(concurrency) > limits.max_batch_size:
        raise click.UsageError(f"--concurrency goes to {max(concurrency)}, this engine runs {limits.max_batch_size}")
    if max_tokens < 2:
        raise click.UsageError("--max-tokens is 1, expected at least 2: the time between tokens is measured")
    if max(contexts) + max_tokens > limits.max_model_len:
        raise click.UsageError(
            f"--contexts and --max-tokens make {max(contexts) + max_tokens}, of {limits.max_model_len} allowed"
        )
    points = measure(
        opened,
        concurrency=list(concurrency),
        contexts=list(contexts),
        num_tokens=max_tokens,
        num_speculative_tokens=num_speculative_tokens,
        checkpoint=checkpoint,
        threads=threads,
        say=stages.say,
    )
    sampling = {"greedy": SamplingParams(temperature=0), "sampled": SamplingParams(temperature=1, top_p=0.95)}
    host = {n: {b: host_overhead_ms(opened, b, params) for b in host_batch_size} for n, params in sampling.items()}
    if chart is not None:
        write_charts(chart, [_panel("decode", points), _panel("prefill", points)])
    if as_json:
        target = opened.manifest.target.name
        write_json({"target": target, "points": [asdict(p) for p in points], "host_step_ms": host})
        return
    if not quiet:
        _print_tables(points, host)


def _panel(kind: str, points: list[Point]) -> Panel:
    series: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        value = point.decode_tok_s if kind == "decode" else point.prefill_tok_s
        series.setdefault(f"context {point.context}", []).append((point.concurrency, value))
    lines = tuple(Line(name, tuple(values)) for name, values in series.items())
    return Panel(f"{kind} throughput", "requests at a time", "tokens/s", lines)


def _print_tables(points: list[Point], host: dict[str, dict[int, float]]) -> None:
    numbers = (
        "context",
        "at once",
        "prefill tok/s",
        "decode tok/s",
        "first token ms, p50",
        "p90",
        "p99",
        "per token ms, p50",
        "p90",
        "p99",
        "cached first token ms",
        "hits",
    )
    table = Table([*(Column(name, "number") for name in numbers), Column("drafts accepted")])
    for p in points:
        first, each = p.first_token_ms, p.per_token_ms
        table.add(
            str(p.context),
            str(p.concurrency),
            f"{p.prefill_tok_s:.1f}",
            f"{p.decode_tok_s:.1f}",
            *(f"{value:.1f}" for value in (first.p50, first.p90, first.p99)),
            *(f"{value:.2f}" for value in (each.p50, each.p90, each.p99)),
            f"{p.cached_first_token_ms.p50:.1f}",
            f"{p.hit_rate:.0%}",
            " ".join(f"{rate:.0%}" for rate in p.acceptance) or "-",
        )
    out = console()
    out.print(table)
    sizes = list(next(iter(host.values())))
    costs = Table([Column("host ms per step"), *(Column(f"batch {size}", "number") for size in sizes)])
    for name, row in host.items():
        costs.add(name, *(f"{row[size]:.3f}" for size in sizes))
    out.print(costs)
