"""`seekforge new-checkpoint`: a small checkpoint folder, trained or random, to try everything without a download."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from rich.filesize import decimal

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import command, json_option, quiet_option, seed_option
from seekforge.common.cli.terminal import echo, typed_command, write_json
from seekforge.common.errors import OptionError
from seekforge.exporter.checkpoint.new import WrittenCheckpoint
from seekforge.exporter.checkpoint.new import new_checkpoint as write_checkpoint
from seekforge.exporter.checkpoint.presets import DTYPES, load_preset, stored_as
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.exporter.checkpoint.trained import copy_trained_checkpoint, trained_folder
from seekforge.exporter.option_types import MODEL


@command(
    "new-checkpoint",
    examples=(
        "seekforge new-checkpoint checkpoint",
        "seekforge new-checkpoint nano --preset nano  # trained: text that makes sense",
        "seekforge new-checkpoint glm --preset glm5-tiny --dtype bf16  # as GLM-5 is published",
        "seekforge new-checkpoint full --preset full --sparse  # true size, no disk space",
    ),
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    type=MODEL,
    default="tiny",
    show_default=True,
    help="Model of configs/models: tiny, tiny-v3, glm5-tiny, nano, small, full, v3-full or glm5-full.",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp8", *DTYPES]),
    default="fp8",
    show_default=True,
    help="How matrices are held: FP8 blocks as DeepSeek does, BF16, or as ModelOpt or compressed-tensors (ct-) do.",
)
@seed_option("Of random weights: the same seed writes the same bytes. Default: 0.")
@click.option("--random", "is_random", is_flag=True, help="Random weights for nano too, which has trained ones.")
@click.option("--sparse", is_flag=True, help="True size and structure, weights as holes: no values, no disk space.")
@click.option("--force", is_flag=True, help="Replace a checkpoint that stands at OUT.")
@quiet_option
@json_option
def new_checkpoint(
    out: Path,
    *,
    preset: str,
    dtype: str,
    seed: int | None,
    is_random: bool,
    sparse: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a small DeepSeek-V3.2 checkpoint to the folder OUT: the trained weights of nano, else random ones.

    File for file what a download is: sharded safetensors with an index, config and tokenizer.
    """
    chosen = stored_as(load_preset(preset), dtype)
    stages = Stages(quiet=quiet or as_json)
    is_trained = not (is_random or sparse) and trained_folder(preset) is not None
    if is_trained and dtype != "fp8":
        raise OptionError(f"--dtype goes with random weights, those of {preset} are trained; add --random")
    if is_trained and seed is not None:
        raise OptionError(
            f"--seed goes with random weights, those of {preset} are trained; leave it out or add --random"
        )
    with stages.bytes_bar("write weights") as progress:
        if sparse:
            written = new_sparse_checkpoint(out, chosen, force=force, progress=progress)
        elif is_trained:
            written = copy_trained_checkpoint(out, chosen, force=force)
        else:
            written = write_checkpoint(out, chosen, seed=seed or 0, force=force, progress=progress)
    if as_json:
        write_json(_summary(written))
    elif not quiet:
        for line in _sentences(written, sparse=sparse):
            echo(line)


def _summary(written: WrittenCheckpoint) -> dict[str, object]:
    return {**dataclasses.asdict(written), "path": str(written.path)}


def _sentences(written: WrittenCheckpoint, *, sparse: bool) -> list[str]:
    disk = f", {decimal(written.disk_bytes)} on disk: weights are holes that read as zero" if sparse else ""
    return [
        f"wrote {written.path}: {written.num_files} files, {written.num_tensors:,} tensors, "
        f"{written.num_parameters:,} parameters, {decimal(written.num_bytes)}{disk}",
        f"next: {typed_command('export', written.path, 'PROGRAM')}",
    ]
