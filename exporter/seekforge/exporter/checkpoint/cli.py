"""`seekforge new-checkpoint`: a checkpoint folder with random weights, to try everything without a download."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from seekforge.exporter.checkpoint.new import WrittenCheckpoint
from seekforge.exporter.checkpoint.new import new_checkpoint as write_checkpoint
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint


@click.command("new-checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--preset", default="tiny", show_default=True, help="Model of configs/models: tiny, small or full.")
@click.option("--seed", default=0, show_default=True, help="The same seed writes the same bytes.")
@click.option("--sparse", is_flag=True, help="True size and structure, weights as holes: no values, no disk space.")
@click.option("--force", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def new_checkpoint(out: Path, *, preset: str, seed: int, sparse: bool, force: bool, quiet: bool, as_json: bool) -> None:
    """Write a DeepSeek-V3.2 checkpoint with random weights to the folder OUT.

    File for file what a download is: sharded FP8 safetensors with an index, config, tokenizer and chat encoder.
    """
    chosen = load_preset(preset)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    show = not quiet and not as_json and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not show) as bar:
        task = bar.add_task("weights", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if sparse:
            written = new_sparse_checkpoint(out, chosen, force=force, progress=progress)
        else:
            written = write_checkpoint(out, chosen, seed=seed, force=force, progress=progress)
    if as_json:
        sys.stdout.write(json.dumps(_summary(written)) + "\n")
    elif not quiet:
        sys.stdout.write(_sentence(written, sparse=sparse))


def _summary(written: WrittenCheckpoint) -> dict[str, object]:
    return {**dataclasses.asdict(written), "path": str(written.path)}


def _sentence(written: WrittenCheckpoint, *, sparse: bool) -> str:
    disk = f", {_bytes(written.disk_bytes)} on disk: weights are holes that read as zero" if sparse else ""
    return (
        f"wrote {written.path}: {written.num_files} files, {written.num_tensors:,} tensors, "
        f"{written.num_parameters:,} parameters, {_bytes(written.num_bytes)}{disk}\n"
        f"next: seekforge export {written.path} PROGRAM\n"
    )


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
