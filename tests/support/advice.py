"""Commands that are refused and then changed as the refusal says."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner, Result

from seekforge.runtime.cli import main as cli

#: An option and, where it has one, its value, as advice writes them.
OPTION = re.compile(r"(--[a-z][a-z-]+)(?: ([\w.]+))?")


def invoke(*args: str | Path) -> Result:
    """Run a command in this process; what is no refusal is raised."""
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*args: str | Path) -> str:
    """Return the line with which a command is refused."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))


def with_option(args: list[str], name: str, value: str | None) -> list[str]:
    """Return `args` with an option as advised, in place of what it was."""
    kept = list(args)
    if name in kept:
        place = kept.index(name)
        del kept[place : place + (1 if value is None else 2)]
    return [*kept, name] if value is None else [*kept, name, value]


def without_option(args: list[str], name: str, *, has_value: bool = True) -> list[str]:
    """Return `args` without an option."""
    place = args.index(name)
    return args[:place] + args[place + 1 + has_value :]
