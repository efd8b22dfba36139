"""What several commands of the runtime ask for in the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import ByteSize, Tokens, Whole, threads_option
from seekforge.runtime.engine.engine_folder import Engine

F = TypeVar("F", bound=Callable[..., Any])

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

#: What every command that serves an engine takes, in this order; they are keyword arguments of `LLM`.
_SERVING = (
    click.option("--max-model-len", type=Tokens(), help="Most tokens of a request.  [default: what the cache holds]"),
    click.option(
        "--max-batch-size", type=Whole(1), help="Most completions at the same time.  [default: the engine's limit]"
    ),
    click.option("--kv-cache-memory", type=ByteSize(), help="Size of the cache.  [default: what fits]"),
    click.option(
        "--max-waiting",
        type=Whole(1),
        default=1024,
        show_default=True,
        help="More completions than that are refused (429).",
    ),
    click.option("--deterministic", is_flag=True, help="Same tokens whatever else runs; CPU only, twice the work."),
    click.option(
        "--no-prefix-caching", "prefix_caching", flag_value=False, default=True, help="Compute every prompt anew."
    ),
    drafts_option,
    checkpoint_option,
    threads_option,
    click.option(
        "--no-self-check", "self_check", flag_value=False, default=True, help="Skip the check against stored results."
    ),
)


def serving_options(function: F) -> F:
    """Add the options of an engine that is served; the command gets them by the names that `LLM` has for them."""
    for option in reversed(_SERVING):
        function = option(function)
    return function


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
