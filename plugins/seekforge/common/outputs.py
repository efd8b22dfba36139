"""Where work writes: looked at before it begins, so that nothing is lost to a folder that is not there.

The command line looks while it reads its arguments, a function that is called from Python before it does anything; a
command that calls such a function leaves it to that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from seekforge.common.errors import OutputError

#: A folder is made beside its place and renamed, a store is filled where it is.
Kind = Literal["file", "folder", "store"]
#: Name of a parameter, of every command and of every function -> what it names.
OUTPUTS: Final[dict[str, Kind]] = {
    "out": "folder",
    "save": "folder",
    "store": "store",
    "cache": "store",
    "output": "file",
    "html": "file",
    "chart": "file",
    "timing_cache": "file",
}


def check_outputs(arguments: Mapping[str, object], inputs: Iterable[object]) -> None:
    """Refuse arguments that name a place which could not be written to, or which the same call reads.

    Args:
        arguments: name of a parameter -> its value; those of `OUTPUTS` that are paths are looked at.
        inputs: what is read, as `check_distinct` takes it.

    Raises:
        OutputError: as `check_output` and `check_distinct`.
    """
    outputs: list[tuple[Path, Kind]] = [
        (value, OUTPUTS[name]) for name, value in arguments.items() if name in OUTPUTS and isinstance(value, Path)
    ]
    for place, kind in outputs:
        check_output(place, kind)
    check_distinct(outputs, inputs)


def check_output(path: Path, kind: Kind) -> None:
    """Refuse a place that could not be written to.

    Raises:
        OutputError: as `check_output_file`, `check_output_folder` and `check_output_store`, or a folder on the way may
            not be searched.
    """
    try:
        _CHECKS[kind](path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written ({reason}); choose another place") from None


def check_distinct(outputs: Iterable[tuple[Path, Kind]], inputs: Iterable[object]) -> None:
    """Refuse an output that is an input or another output, whatever names and links lead there.

    Args:
        outputs: places with their kinds; the same may be named twice, which is what is looked for.
        inputs: what is read: paths, and texts that may be some.

    Raises:
        OutputError: naming it.
    """
    places = list(outputs)
    read = [Path(one) for one in inputs if isinstance(one, Path | str) and _exists(Path(one))]
    for number, (out, kind) in enumerate(places):
        for other in read:
            if _same(out, other):
                raise OutputError(f"{out}: is read by the same command; write to another place")
            if kind == "folder" and _same_or_below(other, out):
                raise OutputError(f"{out}: holds {other}, which is read by the same command; write to another place")
        for second, (place, _) in enumerate(places):
            if second != number and _same(out, place):
                raise OutputError(f"{out}: is to be written twice; give each output a place of its own")


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


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a long text, or one with a null character, is no path
        return False


def _same(one: Path, other: Path) -> bool:
    try:
        if not one.exists():
            return os.path.realpath(one) == os.path.realpath(other)
        if not (one.is_file() or one.is_dir()):
            return False  # a device or a pipe holds nothing
        return other.exists() and one.samefile(other)
    except OSError:
        return False


def _same_or_below(path: Path, folder: Path) -> bool:
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except OSError:
        return False


_CHECKS: Final = {"file": check_output_file, "folder": check_output_folder, "store": check_output_store}
