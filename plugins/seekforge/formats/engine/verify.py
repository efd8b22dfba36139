"""Compare every file of an engine with its digests, and say where one differs.

All bytes are read at the first start on a machine; what was good then is remembered (`verified`), so that the next
start reads nothing. A damaged file is named with the range of its bytes, and with what lies there.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from seekforge.common.errors import EngineError, SeekforgeError
from seekforge.common.files import sha256_file
from seekforge.common.paths import inside
from seekforge.formats.engine import verified
from seekforge.formats.engine.digests import Damage, chunk_bytes, damaged, num_chunks
from seekforge.formats.engine.manifest import MANIFEST, FileDigest, Manifest, rebuild_command
from seekforge.formats.engine.weight_file import WEIGHTS, constants_in
from seekforge.formats.program import load_bindings

#: Told (bytes that were read, bytes that will be).
OnVerify = Callable[[int, int], None]
#: Tensors and places that one message names.
_NAMED = 3


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        num_bytes: bytes of all files.
        read_bytes: bytes of the files that were read now; the others were verified before and are as they were.
    """

    num_bytes: int = 0
    read_bytes: int = 0


def listed_files(folder: Path, manifest: Manifest) -> list[tuple[Path, FileDigest]]:
    """Return the files of an engine with their digests; none of them is read.

    Args:
        folder: the engine folder.
        manifest: the manifest of that folder.

    Raises:
        EngineError: a file is missing, leads out of the folder, or is of another size.
    """
    remedy = f"build it again: {rebuild_command(folder, manifest)}"
    listed: list[tuple[Path, FileDigest]] = []
    for expected in manifest.files:
        path = inside(folder, expected.path, error=EngineError, where=folder / MANIFEST, again=remedy)
        try:
            size = path.stat().st_size
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise EngineError(f"{path}: {reason}; copy it again, or {remedy}") from None
        if size != expected.bytes:
            raise EngineError(f"{path}: {size} bytes, the manifest says {expected.bytes}; copy it again, or {remedy}")
        listed.append((path, expected))
    return listed


def verify_files(
    folder: Path, manifest: Manifest, *, full: bool = False, progress: OnVerify | None = None
) -> Verification:
    """Compare every byte of every file of an engine with its digests.

    Args:
        folder: the engine folder.
        manifest: the manifest of that folder.
        full: read all files, whatever is remembered of them, and compare their SHA-256 as well.
        progress: called with the bytes that were read, and all that will be; by one thread at a time.

    Raises:
        EngineError: a file is missing, leads out of the folder, is of another size, or its bytes differ.
    """
    remedy = f"copy it again, or build it again: {rebuild_command(folder, manifest)}"
    known = {} if full else verified.recall()
    read: list[tuple[Path, FileDigest]] = []
    before: dict[Path, str | None] = {}
    for path, expected in listed_files(folder, manifest):
        size = expected.bytes
        try:
            before[path] = verified.identity(path)
        except OSError:
            raise EngineError(f"{path}: missing; {remedy}") from None
        if len(expected.chunks) != num_chunks(size):
            raise EngineError(
                f"{folder / MANIFEST}: {expected.path} has {len(expected.chunks)} digests, expected {num_chunks(size)} "
                f"of {chunk_bytes(size)} bytes each; {remedy}"
            )
        if known.get(before[path] or "") != _digest(expected):
            read.append((path, expected))
    try:
        tell = None if progress is None else _total(progress, sum(one.bytes for _, one in read))
        places = damaged([(path, one.bytes, one.chunks) for path, one in read], progress=tell)
        if not places and full:
            places = [Damage(path, 0, one.bytes) for path, one in read if sha256_file(path) != one.sha256]
    except OSError as error:
        where = error.filename or folder
        raise EngineError(f"{where}: cannot be read ({error.strerror or error}); {remedy}") from None
    if places:
        raise EngineError(f"{_describe(folder, manifest, places)}; it was changed or damaged, {remedy}")
    _remember(read, before)
    return Verification(sum(one.bytes for one in manifest.files), sum(one.bytes for _, one in read))


def _total(progress: OnVerify, total: int) -> Callable[[int], None]:
    """Return what adds up the bytes that several threads read, and tells the sum."""
    lock, done = threading.Lock(), 0

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    return add


def _digest(file: FileDigest) -> str:
    """Return one digest for all that was compared."""
    return hashlib.sha256("".join((file.sha256, *file.chunks)).encode()).hexdigest()[:32]


def _remember(read: Sequence[tuple[Path, FileDigest]], before: dict[Path, str | None]) -> None:
    """Note the files that nobody wrote to while they were read."""
    digests: dict[str, str] = {}
    for path, expected in read:
        key = before[path]
        try:
            same = key is not None and verified.identity(path) == key
        except OSError:
            same = False
        if same and key is not None:
            digests[key] = _digest(expected)
    verified.remember(digests)


def _describe(folder: Path, manifest: Manifest, places: Sequence[Damage]) -> str:
    """Say which bytes of which file differ, and which tensors lie there."""
    first = places[0]
    ranges = [f"{place.begin:,} to {place.end - 1:,}" for place in places if place.path == first.path]
    others = list(dict.fromkeys(place.path.name for place in places if place.path != first.path))
    text = f"{first.path}: bytes {_words(ranges)} are not what was built"
    names = _constants_at(folder, manifest, places)
    if names:
        text += f" ({'tensors' if len(names) > 1 else 'tensor'} {_words(names)})"
    return text + (f", nor is {_words(others)}" if others else "")


def _constants_at(folder: Path, manifest: Manifest, places: Sequence[Damage]) -> list[str]:
    """Return the tensors of the weight file that lie where the first damaged file is damaged."""
    path = places[0].path
    listed = {file.path for file in manifest.files}
    if path.name != WEIGHTS or "bindings.json" not in listed or any(p.path.name == "bindings.json" for p in places):
        return []
    try:
        graphs = list(load_bindings(folder).values())
        constants = [constants_in(graphs, place.begin, place.end) for place in places if place.path == path]
    except (SeekforgeError, ValueError, KeyError, TypeError):  # of an engine by somebody else
        return []
    return list(dict.fromkeys(name for names in constants for name in names))


def _words(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
