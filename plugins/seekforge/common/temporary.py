"""Temporary folders and files that a killed process leaves behind are found and removed by the next command.

Each has a name that only ours have, `….<pid>-<8 letters>.partial` (or `.old`), and is locked by who made it. The system
lets go of a lock when its process ends, however it ends; so what can be locked belongs to nobody, in whatever container
or under whatever process id it was made. Only the user's own folders and files are looked at, links are not followed,
and where a file system has no locks nothing is removed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_OURS: Final = re.compile(r"(?P<stem>.+)\.\d+-[a-z0-9_]{8}\.(?P<kind>partial|old)")
#: Folders that were looked through by this process.
_SWEPT: Final[set[Path]] = set()


@contextmanager
def temporary_folder(stem: str, *, parent: Path | None = None, kind: str = "partial") -> Iterator[Path]:
    """Give a new folder, removed when the block ends, unless it was renamed meanwhile.

    Args:
        stem: what its name begins with: `seekforge-` and what it is for, where it lies among those of other programs.
        parent: the folder to make it in; None: where the system has temporary files (TMPDIR).
        kind: `partial`, or `old` for a folder `old` in it that was put aside, and is put back if nothing takes its
            place, however the block ends.

    Raises:
        OSError: it cannot be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for place in {parent, Path(tempfile.gettempdir())}:
        sweep(place)
    path, lock = _make(stem, parent, kind)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            _clear(path, stem, kind)
        os.close(lock)


def _make(stem: str, parent: Path, kind: str) -> tuple[Path, int]:
    """Return a new folder and what holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{stem}.{os.getpid()}-", suffix=f".{kind}", dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # removed by a sweep, before it was locked
            continue
        _lock(lock, wait=True)
        if _is_still(path, lock):
            return path, lock
        os.close(lock)


@contextmanager
def temporary_file(path: Path) -> Iterator[int]:
    """Give an open new file beside `path`; when the block ends well it is renamed to `path`, else it is removed.

    Raises:
        OSError: it cannot be made.
    """
    sweep(path.parent)
    while True:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}-", suffix=".partial", dir=path.parent)
        _lock(number, wait=True)
        if _is_still(Path(name), number):
            break
        os.close(number)
    try:
        yield number
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        os.close(number)


def sweep(parent: Path) -> None:
    """Remove what dead processes left in `parent`: once per process. What was put aside there is put back."""
    parent = Path(os.path.realpath(parent))
    if parent in _SWEPT or not hasattr(os, "getuid"):
        return
    _SWEPT.add(parent)
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            match = _OURS.fullmatch(entry.name)
            if match is not None:
                with contextlib.suppress(OSError):
                    _remove(Path(entry.path), match["stem"], match["kind"])


def _remove(path: Path, stem: str, kind: str) -> None:
    about = path.lstat()
    is_folder = stat.S_ISDIR(about.st_mode)
    if about.st_uid != os.getuid() or not (is_folder or stat.S_ISREG(about.st_mode)):
        return
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not _lock(lock, wait=False) or not _is_still(path, lock):
            return
        if not is_folder:
            path.unlink()
            return
        _clear(path, stem, kind)
    finally:
        os.close(lock)


def _clear(path: Path, stem: str, kind: str) -> None:
    """Remove a folder; what was put aside in it is put back if nothing took its place."""
    place = path.parent / stem.removeprefix(".")
    if kind == "old" and (path / "old").exists() and not place.exists():
        (path / "old").rename(place)
    shutil.rmtree(path, ignore_errors=True)


def _lock(number: int, *, wait: bool) -> bool:
    """Lock an open file for as long as it is open; return whether that went well."""
    try:
        fcntl: Any = importlib.import_module("fcntl")  # not on Windows
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def _is_still(path: Path, number: int) -> bool:
    """Return whether `path` is the open file `number`."""
    try:
        status, opened = path.lstat(), os.fstat(number)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == (opened.st_dev, opened.st_ino)
