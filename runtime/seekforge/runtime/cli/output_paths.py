"""Where commands write: looked at before they begin, while their arguments are read.

Every parameter that names a file or folder to write has one of the names of `common/outputs.py:OUTPUTS`, in every
command; the root of the command line checks those, and a test asks that a new path is either there or something that is
read. A command that calls a function of `seekforge` leaves it to the function, which checks the same names.
"""

from __future__ import annotations

from pathlib import Path

import click

from seekforge.common.cli.options import Command
from seekforge.common.outputs import OUTPUTS, Kind, check_distinct, check_output


def check_outputs_of(command: click.Command) -> click.Command:
    """Let a command, and those below it, check its outputs while its arguments are read."""
    if isinstance(command, Command) and command.function is not None:
        return command
    for parameter in command.params:
        if parameter.name in OUTPUTS:
            assert parameter.callback in (None, _check), f"{command.name}: {parameter.name} has a callback of its own"
            parameter.callback = _check
    if isinstance(command, Command):
        command.checks = (_check_distinct,)
    if isinstance(command, click.Group):
        for below in command.commands.values():
            check_outputs_of(below)
    return command


def _check_distinct(ctx: click.Context) -> None:
    outputs: list[tuple[Path, Kind]] = []
    inputs: list[object] = []
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        kind = OUTPUTS.get(parameter.name or "")
        if kind is None and isinstance(parameter.type, click.Choice):
            continue  # its values are words, also where a folder of that name lies here
        if kind is None:
            inputs += value if isinstance(value, tuple) else (value,)
        elif isinstance(value, Path) and str(value) != "-":
            outputs.append((value, kind))
    check_distinct(outputs, inputs)


def _check(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and str(value) != "-":
        check_output(value, OUTPUTS[parameter.name or ""])
    return value
