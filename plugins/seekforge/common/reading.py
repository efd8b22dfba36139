"""How foreign files are read: the one way from bytes to plain values. The rule for their names is in `paths`.

Whatever a folder holds may have been written by anybody. A file that is no regular one (a FIFO, a device) would hang or
fill memory, a JSON text of a gigabyte too; JSON nested a thousand deep ends Python's stack, an integer of a hundred
digits overflows whatever computes with it, half a surrogate pair cannot be printed. All that is refused here, before
anybody looks at a value, as the same two exceptions that reading and parsing have always had: OSError and ValueError.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

#: Largest file of settings (config.json and the like), and of a list of everything in a model (bindings, indices).
SETTINGS_BYTES: Final = 16 << 20
LISTING_BYTES: Final = 512 << 20
#: Levels of lists and objects; what we write has 20 at most.
MAX_DEPTH: Final = 128
_INT64: Final = 2**63

#: A JSON string; one without an end reaches to the end of the text, so that no text is looked at twice.
_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STEP_OF: Final = np.array([{ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}.get(i, 0) for i in range(256)], "i1")
#: Numbers that need a look: integers beyond 15 digits, exponents beyond two.
_LARGE_NUMBER: Final = re.compile(rb"(?<![\d.])\d{16}|[eE]\+?\d{3}")
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


# --- files ----------------------------------------------------------------------------------------------------


def check_regular(path: Path) -> os.stat_result:
    """Return what the system knows of the regular file `path`, links followed.

    Raises:
        OSError: it is missing or something else, such as a folder, a FIFO or a device; `strerror` says what.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"is {kind_of_file(status.st_mode)}, expected a regular file", str(path))
    return status


def is_there(path: Path) -> bool:
    """Return whether a name stands in its folder: also one of a link that leads nowhere, which is damage, no absence.

    Raises:
        OSError: its folder may not be searched.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_bytes(path: Path, *, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or larger; `strerror` says what.
    """
    check_regular(path)
    # without waiting: it may be another file by now, and some of /proc block
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"is {kind_of_file(status.st_mode)}, expected a regular file", str(path))
        # not `most` at once: so much would be set aside
        raw = b"" if status.st_size > most else file.read(min(status.st_size, most) + 1)
    if max(status.st_size, len(raw)) > most:
        size = max(status.st_size, len(raw))
        raise OSError(errno.EFBIG, f"has {size:,} bytes, expected at most {most:,}", str(path))
    return raw


def lines_of(file: BinaryIO, *, most: int) -> Iterator[bytes]:
    """Yield the lines of an open file, each with its newline; only the last may be without.

    Raises:
        ValueError: a line has more than `most` bytes, which no more than these are read of.
    """
    for number in itertools.count(1):
        line = file.readline(most + 1)
        if not line:
            return
        if len(line) > most:
            raise ValueError(f"line {number} has more than {most:,} bytes")
        yield line


def read_text(path: Path, *, most: int) -> str:
    """Return the UTF-8 text of a file; see `read_bytes`.

    Raises:
        ValueError: it is no UTF-8.
        OSError: as `read_bytes`.
    """
    return _decoded(read_bytes(path, most=most))


def read_json(path: Path, *, most: int = SETTINGS_BYTES) -> Any:
    """Return the value that a JSON file holds; see `read_bytes` and `parse_json`.

    Raises:
        ValueError: it is no JSON, or holds what `parse_json` refuses.
        OSError: as `read_bytes`.
    """
    return parse_json(read_bytes(path, most=most))


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None


def kind_of_file(mode: int) -> str:
    """Return what a file is that is no regular one, in words."""
    kinds = {
        "a folder": stat.S_ISDIR,
        "a FIFO": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda one: stat.S_ISCHR(one) or stat.S_ISBLK(one),
    }
    return next((kind for kind, fits in kinds.items() if fits(mode)), "no file")


# --- JSON -----------------------------------------------------------------------------------------------------


def parse_json(raw: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON or no UTF-8; or it is nested deeper than `MAX_DEPTH`, names a key twice, holds NaN,
            infinity, an integer beyond 64 bits, a number beyond f64, or half of a surrogate pair.
    """
    if isinstance(raw, str):
        text = raw
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    else:
        text = _decoded(raw)
    bare = _STRING.sub(b"", raw)
    brackets = bare.translate(None, _NOT_BRACKETS)
    if len(brackets) > MAX_DEPTH:
        depth = int(np.cumsum(_STEP_OF[np.frombuffer(brackets, np.uint8)], dtype=np.int64).max())
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested {depth} deep, expected at most {MAX_DEPTH}")
    hooks: dict[str, Any] = {"parse_int": _int64, "parse_float": _finite} if _LARGE_NUMBER.search(bare) else {}
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, **hooks)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it names {twice!r} twice")
    return unique


def _no_constant(word: str) -> Any:
    raise ValueError(f"it holds {word}, expected a number")


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -_INT64 <= (value := int(digits)) < _INT64:
        raise ValueError(f"the integer {digits[:24]}{'…' if len(digits) > 24 else ''} has more than 64 bits")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:24]} is out of range")
    return value
