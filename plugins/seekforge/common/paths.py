"""The one rule for names of files that an artifact gives.

A name in an artifact (`Manifest.files`, `GraphIO.file`, `Program.files`, a dump's tensors, an index of kernels or
shards) is relative, lies inside its folder also when links are followed, and is a regular file: `RelativePath` checks
the name, `inside` the disk. What stands directly in a checkpoint was put there by a download tool, whose cache is made
of links: see `checkpoint_file`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final

from seekforge.common.errors import SeekforgeError
from seekforge.common.reading import check_regular
from seekforge.common.records import RecordError

#: A path longer than this opens on no system.
_MAX_NAME: Final = 1024
_HUGGING_FACE_BLOB: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def name_fault(name: str) -> str | None:
    """Return what is wrong with a file's name in an artifact, None: nothing.

    It has parts between slashes, none of them empty, `.` or `..`; no backslash, colon or control character, which
    lead elsewhere or show as something else on some systems.
    """
    if not name:
        return "is empty, expected the name of a file"
    if len(name) > _MAX_NAME:
        return f"has {len(name)} characters, expected at most {_MAX_NAME}"
    if any(character in '\\:*?"<>|' or not character.isprintable() for character in name):
        return f"is {name!r}, expected no backslash, colon, wildcard or control character in it"
    if name.startswith("/") or ".." in name.split("/"):
        return f"is {name!r}, which lies outside the folder"
    if any(part in ("", ".") or part.endswith((" ", ".")) or len(part.encode()) > 255 for part in name.split("/")):
        return f"is {name!r}, expected parts between single slashes"
    return None


def _relative(value: Any) -> str:
    if not isinstance(value, str):
        raise RecordError(f"is a {type(value).__name__}, expected the name of a file")
    fault = name_fault(value)
    if fault is not None:
        raise RecordError(fault)
    return value


#: Field of a `Record`: a file of the same folder or below it.
RelativePath = Annotated[str, _relative]


def same_names(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two names that are one file on a disk that ignores case, or one that is there twice; None: neither."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold()
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None


def inside(
    folder: Path,
    name: str,
    *,
    error: type[SeekforgeError],
    where: Path | str,
    again: str = "make it again",
) -> Path:
    """Return the path of the file `name` of `folder`; whether it is there, its reader says.

    Args:
        folder: the folder of the artifact.
        name: the name that the artifact has for it.
        error: what to raise.
        where: the file that names it, for the message.
        again: what to do about it.

    Raises:
        SeekforgeError: `error`, if the name or a link leads out of the folder, or it is no regular file.
    """
    fault = name_fault(name)
    if fault is not None:
        raise error(f"{where}: the name of a file {fault}; {again}")
    path = folder / name
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise error(f"{path}: is a link that leads outside {folder}, to {real}; copy the file itself, or {again}")
    try:
        check_regular(path)
    except FileNotFoundError:
        return path
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}; {again}") from None
    return path


def real_path(path: Path) -> Path:
    """Return where a path leads, absolute and without links. Links that loop stay; `Path.resolve` raises of them."""
    return Path(os.path.realpath(path))


def checkpoint_file(folder: Path, name: str, *, error: type[SeekforgeError]) -> Path:
    """Return the path of a file of a checkpoint that is copied along with what is made of it.

    Download tools keep one copy of each file and link to it, so a link is followed if it stays in the folder or leads
    to a blob of Hugging Face's cache (`blobs/` and a digest). No other: text of somebody's other files must not end
    in a folder that is passed on. What is only read (config.json, index, shards) may be a link to any regular file.

    Raises:
        SeekforgeError: `error`, if it is a link that leads elsewhere, or no regular file.
    """
    path = folder / name
    try:
        check_regular(path)
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}; download the checkpoint again") from None
    real = Path(os.path.realpath(path))
    is_blob = real.parent.name == "blobs" and _HUGGING_FACE_BLOB.fullmatch(real.name) is not None
    if not is_blob and not real.is_relative_to(os.path.realpath(folder)):
        raise error(
            f"{path}: is a link that leads outside {folder}, to {real}; only links into Hugging Face's cache are "
            "followed: copy the file itself"
        )
    return path
