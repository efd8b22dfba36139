"""`seekforge kernels`: compile the operators' kernels, and show what they cost."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from seekforge.exporter.build import kernel_numbers
from seekforge.exporter.checkpoint.presets import known_presets, load_preset
from seekforge.plugins import aot
from seekforge.plugins.errors import TargetError
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.kernel_sizes import DEFAULT_FORMAT, operators
from seekforge.plugins.launch import SMS, KernelSet


@click.group("kernels")
def kernels() -> None:
    """Compile the operators' GPU kernels ahead of time."""


@kernels.command("build")
@click.argument("store", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--sm", "sms", default=",".join(map(str, SMS)), show_default=True, help="Compute capabilities.")
@click.option("--model", default="full", show_default=True, help="A name of configs/models, or a config.json.")
@click.option("--kv-format", type=click.Choice(["bf16", "fp8_ds"]), default=DEFAULT_FORMAT, show_default=True)
@click.option("--op", "only", multiple=True, help="Only this operator (may be repeated).")
@click.option("--jobs", type=click.IntRange(min=1), default=None, help="Processes; default one per core.")
@click.option("--cache", type=click.Path(path_type=Path), default=None, help="Folder of compiled images.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the record of each kernel as JSON.")
def build(
    store: Path,
    *,
    sms: str,
    model: str,
    kv_format: str,
    only: tuple[str, ...],
    jobs: int | None,
    cache: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile every kernel that the model needs into the folder OUT, and print what their code costs. Needs no GPU."""
    config = load_preset(model).config if model in known_presets() else ModelConfig.load(Path(model))
    ops = operators(config, kv_format=kv_format)
    unknown = set(only) - set(ops)
    if unknown:
        raise TargetError(f"no kernels of {', '.join(sorted(unknown))}; operators are {', '.join(ops)}")
    work = aot.tasks({op: bound for op, bound in ops.items() if not only or op in only}, _parse_sms(sms))
    start = time.perf_counter()
    console = Console(stderr=True)
    with Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=quiet or as_json or not console.is_terminal,
    ) as bar:
        row = bar.add_task("", total=len(work))

        def advance(task: aot.Task, done: KernelSet | None) -> None:
            if done is not None:
                bar.update(row, advance=1, description=f"{task.op} sm{task.sm}")

        cache = cache or aot.default_cache()
        sets = aot.build(work, store, cache=cache, jobs=jobs, progress=advance)
        bar.update(row, description="reading their code")
        found = kernel_numbers.records(sets, store, cache=cache, jobs=jobs) if as_json or not quiet else []
    slow = kernel_numbers.faults(found, kernel_numbers.variants_of(sets))
    seconds = time.perf_counter() - start
    if as_json:
        summary = {"path": str(store), "seconds": round(seconds, 3), "kernels": found, "slow": slow}
        sys.stdout.write(json.dumps(summary) + "\n")
    elif not quiet:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(kernel_numbers.table(found))
        count = len(found)
        console.print(f"wrote {store}: {count} kernels for {len({one.sm for one in sets})} SMs in {seconds:.0f} s")
        for line in slow:
            console.print(f"slow: {line}")


def _parse_sms(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise TargetError(f"--sm {text}: expected numbers such as 80,90") from None
