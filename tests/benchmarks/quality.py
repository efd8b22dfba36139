"""The table and the chart of docs/quality.md: every precision that runs here, and what others would cost.

Exports the checkpoint in both numerics, builds an engine of each precision of the CPU backend for both, measures them
with `seekforge parity --quality` beside every reference form, prints the table as Markdown and draws the chart.

    python -m tests.benchmarks.quality CHECKPOINT TASKS --chart docs/quality.svg --report quality.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seekforge import build, export, parity
from seekforge.common.cli.charts import write_figure
from seekforge.exporter.parity.api import FORM_NAMES
from seekforge.exporter.parity.report.quality import cells, columns
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.quality import read_tasks
from seekforge.formats.targets import CPU_PRECISIONS


def sampled(tasks: Path, out: Path, rows: int | None) -> Path:
    """Write at most so many rows of each task, drawn from a seed; None: all."""
    lines = [line for line in tasks.read_text(encoding="utf-8").splitlines() if line.strip()]
    by_task: dict[str, list[str]] = {}
    for line, row in zip(lines, read_tasks(tasks).rows, strict=True):
        by_task.setdefault(row.task, []).append(line)
    rng = random.Random(0)
    kept = [rng.sample(part, min(rows or len(part), len(part))) for part in by_task.values()]
    out.write_text("\n".join(line for part in kept for line in part) + "\n", encoding="utf-8")
    return out


def engines_of(checkpoint: Path, work: Path) -> list[Path]:
    """Build an engine of every precision of the CPU, for both numerics."""
    engines: list[Path] = []
    for numerics in NUMERICS:
        program = work / f"program-{numerics}"
        export(checkpoint, program, numerics=numerics)
        for precision in CPU_PRECISIONS:
            engine = work / f"{numerics}-{precision}"
            build(program, engine, target="cpu", checkpoint=checkpoint, precision=precision)
            engines.append(engine)
            print(f"built {engine.name}", flush=True)
    return engines


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    heads = columns(report)
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(report, entry))} |" for entry in report["entries"])])


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw each entry by the bytes of its weights and its loss, and what forms of caches cost."""
    texts = [i for i, task in enumerate(report["entries"][0]["tasks"]) if task["nll"] is not None]
    scored = [i for i, task in enumerate(report["entries"][0]["tasks"]) if task["score"] is not None]
    exact = report["entries"][0]
    loss = [sum(entry["tasks"][i]["nll"] - exact["tasks"][i]["nll"] for i in texts) for entry in report["entries"]]
    score = [sum(entry["tasks"][i]["score"] for i in scored) / max(len(scored), 1) for entry in report["entries"]]
    names = [cells(report, entry)[0] for entry in report["entries"]]
    colors = ["#d9822b" if entry["kind"] == "reference" else "#2f6fde" for entry in report["entries"]]

    def fill(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3, sharey=True)
        places = list(range(len(names)))
        for axes, values, title in (
            (left, [value * 1000 for value in loss], "loss to the exact model, 0.001 nats a token"),
            (middle, [100 * value for value in score], "mean score of the tasks with answers, %"),
            (right, [entry["weight_bytes"] / 1e6 for entry in report["entries"]], "weights, MB"),
        ):
            bars = axes.barh(places, values, color=colors)
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
            axes.set_title(title, fontsize=9)
            axes.margins(x=0.2)
        left.set_yticks(places, names)
        left.invert_yaxis()

    write_figure(path, (12, 0.42 * len(names) + 1.0), fill, dpi=100)


def machine() -> str:
    """Say where and when."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores of {model}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--rows", type=int, help="most rows of each task; default: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        work = Path(folder)
        tasks = sampled(options.tasks, work / options.tasks.name, options.rows)
        engines = engines_of(options.checkpoint, work)
        result = parity(
            engines,
            checkpoint=options.checkpoint,
            quality=tasks,
            forms=FORM_NAMES,
            threads=options.threads,
            progress=lambda stage: print(stage, flush=True),
        )
    report = result.to_json()
    if options.report is not None:
        options.report.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.chart is not None:
        draw(report, options.chart)
    print(machine())
    print(markdown(report))


if __name__ == "__main__":
    main()
