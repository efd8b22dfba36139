"""`seekforge kernels`: compile the operators' kernels, and show what they cost."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from seekforge.exporter.checkpoint.presets import known_presets, load_preset
from seekforge.plugins import aot
from seekforge.plugins.errors import TargetError
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.kernel_rules import unlisted_spills
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
    """Compile every kernel that the model needs into the folder OUT. No GPU is needed."""
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

        sets = aot.build(work, store, cache=cache or aot.default_cache(), jobs=jobs, progress=advance)
    seconds = time.perf_counter() - start
    if as_json:
        sys.stdout.write(
            json.dumps({"path": str(store), "seconds": round(seconds, 3), "kernels": records(sets)}) + "\n"
        )
    elif not quiet:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(table(sets))
        count = sum(len(one.images) for one in sets)
        spills = unlisted_spills(sets)
        console.print(f"wrote {store}: {count} kernels for {len({one.sm for one in sets})} SMs in {seconds:.0f} s")
        for line in spills:
            console.print(f"spills: {line}")


def _parse_sms(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise TargetError(f"--sm {text}: expected numbers such as 80,90") from None


def records(sets: list[KernelSet]) -> list[dict[str, object]]:
    """Return one flat record per kernel."""
    return [
        {
            "op": one.op,
            "sm": one.sm,
            "kernel": image.variant,
            "warps": image.num_warps,
            "registers": image.resources.registers,
            "spill_bytes": image.resources.stack_bytes,
            "shared_bytes": image.resources.shared_bytes,
            "occupancy": image.resources.occupancy,
            "main_loop": image.main_loop,
        }
        for one in sets
        for image in one.images.values()
    ]


def table(sets: list[KernelSet]) -> Table:
    """Return the resource table: one row per kernel, registers / spilled bytes / shared KB / occupancy per SM."""
    sms = sorted({one.sm for one in sets})
    result = Table("operator", "kernel", *(f"sm{sm}" for sm in sms), title="registers/spill bytes/shared KB/occupancy")
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for one in sets:
        for image in one.images.values():
            used = image.resources
            text = f"{used.registers}/{used.stack_bytes}/{used.shared_bytes / 1024:.0f}/{used.occupancy * 100:.0f}%"
            cells.setdefault((one.op, image.variant), {})[one.sm] = text
    for (op, name), row in cells.items():
        result.add_row(op, name, *(row.get(sm, "–") for sm in sms))
    return result
