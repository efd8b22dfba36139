"""`seekforge train`: a checkpoint from a seed, or a given one trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import (
    Number,
    Whole,
    command,
    json_option,
    quiet_option,
    seed_option,
    threads_option,
)
from seekforge.common.cli.terminal import echo, typed_command, write_json
from seekforge.exporter.option_types import MODEL


@command(
    "train",
    examples=(
        "seekforge train checkpoint --preset nano",
        "seekforge train tuned --checkpoint nano --data examples.jsonl --steps 200",
    ),
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--preset", type=MODEL, help="Train a preset of configs/models from nothing: nano.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FOLDER|REPO",
    help="Train this checkpoint on; a Hugging Face repository is downloaded.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help='Examples for it, JSONL: {"prompt": ..., "completion": ...} or {"text": ...} in each line.',
)
@seed_option("Of the first weights and of what is drawn.", default=0)
@click.option("--steps", type=Whole(1), help="Updates. Default: those of the preset, 200 for a checkpoint.")
@click.option("--rate", type=Number(0, above=True), default=1.0, show_default=True, help="Factor on learning rates.")
@threads_option
@click.option("--force", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@quiet_option
@json_option
def train(out: Path, *, quiet: bool, as_json: bool, **options: Any) -> None:
    """Train a small DeepSeek-V3.2 on CPU cores and write it to the folder OUT.

    With --preset the weights come from a seed, with --checkpoint from a folder. OUT.state keeps what was reached while
    it runs: the same command goes on from there, also after a crash. docs/nano.md says what nano learns, and how.
    """
    from seekforge.exporter.training import api

    result = api.train(out, progress=Stages(quiet=quiet or as_json), **options)
    if as_json:
        write_json(result.to_json())
    elif not quiet:
        resumed = f", resumed from step {result.resumed_from:,}" if result.resumed_from else ""
        echo(
            f"wrote {result.path}: {result.steps:,} steps, {result.num_tokens:,} tokens, "
            f"loss {result.loss:.3f}{resumed}"
        )
        echo(f"next: {typed_command('export', result.path, 'PROGRAM')}")
