"""What several commands of the runtime ask for in the same words."""

from __future__ import annotations

from pathlib import Path

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import Whole
from seekforge.runtime.engine.engine_folder import Engine

#: Decorator: `checkpoint`, checked by `check_checkpoint` once the engine is open.
checkpoint_option = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FOLDER|REPO",
    help="GPU engines: where the weights are; a repository is downloaded. Default: where they were at build.",
)

#: Decorator: `num_speculative_tokens`.
drafts_option = click.option(
    "--num-speculative-tokens", type=Whole(0, 5), default=0, show_default=True, help="Tokens to draft per step."
)


def open_engine(folder: Path, stages: Stages, *, verify: bool = False, part: bool = False) -> Engine:
    """Open an engine and show how far its files are compared; the stage lasts on. Arguments as of `Engine.open`."""
    with stages.bytes_bar("checking files", closes=False) as progress:
        return Engine.open(folder, verify=verify, part=part, progress=progress)


def check_checkpoint(engine: Engine, checkpoint: Path | None) -> None:
    """Refuse a checkpoint that would not be read.

    Raises:
        UsageError: the engine has its own weights.
    """
    if checkpoint is not None and engine.manifest.weights is None:
        target = engine.manifest.target.name
        raise click.UsageError(
            f"--checkpoint is for engines without weights; {engine.folder} ({target}) has its own; leave it out"
        )
