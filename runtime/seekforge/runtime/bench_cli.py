"""`seekforge bench`: measure an engine; a table on stdout, or JSON, and a chart if asked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from seekforge.plugins.charts import Line, Panel, check_chart, write_charts
from seekforge.runtime.bench import Point, host_overhead_ms, measure
from seekforge.runtime.engine import Engine
from seekforge.runtime.options import check_checkpoint, checkpoint_option
from seekforge.runtime.sampling import SamplingParams


class _Numbers(click.ParamType):
    """Whole numbers from 1, separated by commas."""

    name = "N,N,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < 1:
            self.fail(f"{value!r}, expected whole numbers from 1, separated by commas", param, ctx)
        return numbers


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--concurrency", type=_Numbers(), default="1,4", show_default=True, help="Requests at a time.")
@click.option("--context", "contexts", type=_Numbers(), default="64,512", show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", type=click.IntRange(min=2), default=32, show_default=True, help="Tokens that each generates.")
@click.option(
    "--num-speculative-tokens",
    type=click.IntRange(0, 5),
    default=0,
    show_default=True,
    help="Tokens to draft per step.",
)
@click.option(
    "--host-batch", type=_Numbers(), default="1,64,256", show_default=True, help="Batches for the host's cost."
)
@checkpoint_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: the cores this process may use.")
@click.option("--chart", type=click.Path(path_type=Path, dir_okay=False), help="Draw what was measured: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    engine: Path,
    concurrency: list[int],
    contexts: list[int],
    tokens: int,
    num_speculative_tokens: int,
    host_batch: list[int],
    checkpoint: Path | None,
    threads: int | None,
    chart: Path | None,
    as_json: bool,
) -> None:
    """Measure ENGINE: throughput and latency over concurrency and context, cache hits, drafts, the host's own cost."""
    if chart is not None:
        check_chart(chart)
    opened = Engine.open(engine)
    check_checkpoint(opened, checkpoint)
    limits = opened.manifest.limits
    if max(concurrency) > limits.max_batch_size:
        raise click.UsageError(f"--concurrency goes to {max(concurrency)}, this engine runs {limits.max_batch_size}")
    if max(contexts) + tokens > limits.max_model_len:
        raise click.UsageError(
            f"--context and --tokens make {max(contexts) + tokens}, of {limits.max_model_len} allowed"
        )
    points = measure(
        opened,
        concurrency=concurrency,
        contexts=contexts,
        num_tokens=tokens,
        num_speculative_tokens=num_speculative_tokens,
        checkpoint=checkpoint,
        threads=threads,
        say=lambda line: click.echo(line, err=True),
    )
    sampling = {"greedy": SamplingParams(temperature=0), "sampled": SamplingParams(temperature=1, top_p=0.95)}
    host = {n: {b: host_overhead_ms(opened, b, params) for b in host_batch} for n, params in sampling.items()}
    if chart is not None:
        write_charts(chart, [_panel("decode", points), _panel("prefill", points)])
    if as_json:
        target = opened.manifest.target.name
        click.echo(json.dumps({"target": target, "points": [asdict(p) for p in points], "host_step_ms": host}))
        return
    _print_table(points, host)


def _panel(kind: str, points: list[Point]) -> Panel:
    series: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        value = point.decode_tok_s if kind == "decode" else point.prefill_tok_s
        series.setdefault(f"context {point.context}", []).append((point.concurrency, value))
    lines = tuple(Line(name, tuple(values)) for name, values in series.items())
    return Panel(f"{kind} throughput", "requests at a time", "tokens/s", lines)


def _print_table(points: list[Point], host: dict[str, dict[int, float]]) -> None:
    click.echo(
        "context  at once  prefill tok/s  decode tok/s  first token ms (p50 p90 p99)  per token ms (p50 p90 p99)  "
        "cached first  hits  drafts accepted"
    )
    for p in points:
        first, each = p.first_token_ms, p.per_token_ms
        drafts = " ".join(f"{rate:.0%}" for rate in p.acceptance) or "-"
        click.echo(
            f"{p.context:7}  {p.concurrency:7}  {p.prefill_tok_s:13.1f}  {p.decode_tok_s:12.1f}  "
            f"{first.p50:10.1f} {first.p90:8.1f} {first.p99:8.1f}  {each.p50:10.2f} {each.p90:7.2f} {each.p99:7.2f}  "
            f"{p.cached_first_token_ms.p50:12.1f}  {p.hit_rate:4.0%}  {drafts}"
        )
    for name, row in host.items():
        click.echo(f"host ms per step, {name}: " + ", ".join(f"batch {b} {value:.3f}" for b, value in row.items()))
