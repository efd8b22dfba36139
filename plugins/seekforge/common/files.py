"""Write folders so that nothing half-written is ever seen, and digest the files in them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from seekforge.common.errors import OutputError
from seekforge.common.temporary import sweep, temporary_file, temporary_folder


def explain_os_error(error: OSError, path: Path) -> OutputError:
    """Turn an error met while writing `path` into one clear line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: the disk is full; free space or choose another folder, nothing was kept")
    reason = error.strerror or str(error)
    return OutputError(f"{path}: cannot be written ({reason}); choose a folder you may write to")


def check_vacant(out: Path, *, force: bool = False, marker: str | None = None) -> None:
    """Refuse a folder whose place is taken. Arguments as in `atomic_folder`.

    Raises:
        OutputError: `out` is a file, or exists and is not empty and may not be replaced.
    """
    if out.is_file():
        raise OutputError(f"{out}: is a file, expected a folder or a new name")
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and not force:
        raise OutputError(f"{out}: exists and is not empty; choose a new folder, or pass --force to replace it")
    if occupied and marker is not None and not (out / marker).exists():
        raise OutputError(f"{out}: holds files but no {marker}, so --force will not replace it; choose a new folder")


@contextmanager
def atomic_folder(out: Path, *, force: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Give a temporary sibling of `out` to fill; rename it to `out` when the block ends well.

    On any error the temporary folder is removed and what stood at `out` is as it was.

    Args:
        out: the folder to make.
        force: replace a folder that exists and is not empty.
        marker: a file that only our own folders hold (such as `program.json`). With `force`, a folder
            without it is refused: a typing mistake must not delete somebody's home.

    Raises:
        OutputError: `out` exists and is not empty (without `force`), is a file, or cannot be written.
    """
    out = Path(out)
    sweep(out.parent)
    check_vacant(out, force=force, marker=marker)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = contextlib.ExitStack()
        temporary = made.enter_context(temporary_folder(f".{out.name}", parent=out.parent))
    except OSError as error:
        raise explain_os_error(error, out) from None
    with made:
        try:
            temporary.chmod(0o777 & ~_umask())
            with _blaming_the_right_file(temporary, out):
                yield temporary
            _replace_folder(temporary, out, force=force)
        except OSError as error:
            raise explain_os_error(error, out) from error


@contextmanager
def _blaming_the_right_file(temporary: Path, out: Path) -> Iterator[None]:
    """Say of an error about a file elsewhere, such as one that is read, that it is about that file."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if not isinstance(name, str | bytes) or Path(os.fsdecode(name)).is_relative_to(temporary):
            raise
        place, reason = os.fsdecode(name), error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise explain_os_error(error, Path(place)) from error
        raise OutputError(f"{place}: {reason[:1].lower()}{reason[1:]}; nothing was written to {out}") from error


def _replace_folder(new: Path, out: Path, *, force: bool) -> None:
    """Rename `new` to `out`; what stood there is put aside first, and put back unless that goes well.

    Without `force` nothing may stand there, also if it came while `new` was filled: a rename replaces an empty folder.
    """
    if not force or not out.exists():
        try:
            new.rename(out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise OutputError(
                f"{out}: another command wrote it meanwhile; choose a new folder, or pass --force to replace it"
            ) from None
        return
    with temporary_folder(f".{out.name}", parent=out.parent, kind="old") as aside:
        out.rename(aside / "old")
        new.rename(out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_text(value: Any) -> str:
    """Return `value` as stable, readable JSON: same value, same text."""
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `json_text` of `value`. A file that stands there is replaced whole: who reads or maps it keeps the old."""
    replace_file(path, json_text(value).encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file beside `path` to write, which becomes `path` when the block ends well: it is never seen half-written,
    nor changed under a reader.

    Raises:
        OSError: it cannot be written; what stood at `path` is as it was.
    """
    mode = path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask()
    with temporary_file(path) as number:
        os.fchmod(number, mode)
        with os.fdopen(number, "wb", closefd=False) as file:
            yield file


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `replacing` does."""
    with replacing(path) as file:
        file.write(data)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
