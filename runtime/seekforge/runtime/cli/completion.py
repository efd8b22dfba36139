"""`seekforge completion`: the lines that let a shell complete commands, options, targets and models."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from seekforge.common.cli.options import command
from seekforge.common.cli.terminal import write

_SHELLS = ("bash", "zsh", "fish")


@command(
    "completion",
    examples=(
        'eval "$(seekforge completion bash)"  # in ~/.bashrc; zsh alike',
        "seekforge completion fish | source",
    ),
)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what SHELL must run to complete seekforge: commands, options, targets, models, files."""
    completer = get_completion_class(shell)
    assert completer is not None
    write(completer(ctx.find_root().command, {}, "seekforge", "_SEEKFORGE_COMPLETE").source())
