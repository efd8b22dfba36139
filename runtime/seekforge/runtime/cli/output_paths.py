"""Where commands write: looked at before they begin, so that no work is lost to a folder that is not there.

Every parameter that names a file or folder to write has one of the names below, in every command; the root of the
command line checks those, and a test asks that a new path is either here or something that is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

import click

from seekforge.common.cli.options import Command
from seekforge.common.errors import OutputError

#: Name of a parameter -> what it names. A folder is made beside its place and renamed, a store is filled where it is.
OUTPUTS: Final[dict[str, Literal["file", "folder", "store"]]] = {
    "out": "folder",
    "save": "folder",
    "store": "store",
    "cache": "store",
    "output": "file",
    "html": "file",
    "chart": "file",
    "timing_cache": "file",
}


def check_output_file(path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        OutputError: it is a folder, its own folder is not there, or one of them may not be written to.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, expected the name of a file")
    folder = path.parent
    if not folder.is_dir():
        reason = "is no folder" if folder.exists() else "does not exist"
        raise OutputError(f"{path}: cannot be written, since {folder} {reason}; make that folder first")
    _check_permission(path, path if path.exists() else folder)


def check_output_folder(path: Path) -> None:
    """Refuse a folder that could not be made or replaced; those above it are made too.

    Raises:
        OutputError: it, or something above it, is a file, or what is above it may not be written to.
    """
    _check_permission(path, _above(path))


def check_output_store(path: Path) -> None:
    """Refuse a folder that could not be filled where it is, or be made.

    Raises:
        OutputError: it, or something above it, is a file or may not be written to.
    """
    above = _above(path)
    _check_permission(path, path if path.is_dir() else above)


def _above(path: Path) -> Path:
    """Return the nearest folder above that is there."""
    if path.is_file():
        raise OutputError(f"{path}: is a file, expected a folder or a new name")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise OutputError(f"{path}: cannot be written, since {above} is a file; choose another folder")
    return above


def _check_permission(path: Path, changed: Path) -> None:
    if not os.access(changed, os.W_OK):
        raise OutputError(f"{path}: cannot be written (no permission to write to {changed}); choose another place")


def check_outputs_of(command: click.Command) -> click.Command:
    """Let a command, and those below it, check its outputs while its arguments are read."""
    for parameter in command.params:
        if parameter.name in OUTPUTS:
            assert parameter.callback in (None, _check), f"{command.name}: {parameter.name} has a callback of its own"
            parameter.callback = _check
    if isinstance(command, Command):
        command.checks = (check_distinct,)
    if isinstance(command, click.Group):
        for below in command.commands.values():
            check_outputs_of(below)
    return command


def check_distinct(ctx: click.Context) -> None:
    """Refuse an output that is an input or another output, whatever names and links lead there.

    Raises:
        OutputError: naming it.
    """
    outputs: dict[str, Path] = {}
    inputs: list[Path] = []
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if parameter.name in OUTPUTS:
            if isinstance(value, Path) and str(value) != "-":
                outputs[parameter.name] = value
            continue
        values = value if isinstance(value, tuple) else (value,)
        inputs += [Path(one) for one in values if isinstance(one, Path | str) and _exists(Path(one))]
    for name, out in outputs.items():
        for other in inputs:
            if _same(out, other):
                raise OutputError(f"{out}: is read by the same command; write to another place")
            if OUTPUTS[name] == "folder" and _same_or_below(other, out):
                raise OutputError(f"{out}: holds {other}, which is read by the same command; write to another place")
        for second, place in outputs.items():
            if second != name and _same(out, place):
                raise OutputError(f"{out}: is to be written twice; give each output a place of its own")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a long text, or one with a null character, is no path
        return False


def _same(one: Path, other: Path) -> bool:
    try:
        if not one.exists():
            return one.resolve() == other.resolve()
        if not (one.is_file() or one.is_dir()):
            return False  # a device or a pipe holds nothing
        return other.exists() and one.samefile(other)
    except (OSError, RuntimeError):
        return False


def _same_or_below(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return False


def _check(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and str(value) != "-":
        try:
            _CHECKS[OUTPUTS[parameter.name or ""]](value)
        except OSError as error:  # a folder on the way may not be searched
            reason = error.strerror or str(error)
            raise OutputError(f"{value}: cannot be written ({reason}); choose another place") from None
    return value


_CHECKS = {"file": check_output_file, "folder": check_output_folder, "store": check_output_store}
