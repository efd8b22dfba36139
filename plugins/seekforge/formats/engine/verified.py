"""Which files were verified before: while nobody wrote to one, it need not be read again.

A file is known by host, device, inode, size, and the times of its last change of content (mtime) and of anything
(ctime, which no program can set back). That belongs to a machine and not to an engine: a folder that is copied or
restored elsewhere was not verified there. So the list is one small file in the user's cache, `verified.json`, and never
in an engine's folder, which may be read-only, shared or signed. The environment variable SEEKFORGE_VERIFIED_CACHE
names another file; set to nothing, nothing is remembered and nothing is written. What a disk does to its bytes by
itself changes no time: `--verify` reads every byte again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from seekforge.common.files import write_json
from seekforge.common.reading import read_json
from seekforge.common.user_cache import user_cache

#: Names the file; set to nothing: none.
VARIABLE: Final = "SEEKFORGE_VERIFIED_CACHE"
_FORMAT: Final = 1
#: So many files are remembered, the latest ones.
_MOST: Final = 4096
#: A file that was written so shortly before it was read could be written again without its times telling: clocks of
#: files tick some hundred times a second, on some file systems every two seconds.
_TICK_NS: Final = 20_000_000
_COARSE_TICK_NS: Final = 2_500_000_000


def place() -> Path | None:
    """Return the file that remembers, None: nothing is remembered."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = user_cache()
    return None if cache is None else cache / "verified.json"


def identity(path: Path) -> str | None:
    """Return what tells the file `path`, as it is now, from any other; None if it was written just now.

    Raises:
        OSError: it is not there.
    """
    now, status = time.time_ns(), path.stat()
    latest = max(status.st_mtime_ns, status.st_ctime_ns)
    coarse = status.st_mtime_ns % 1_000_000_000 == 0 and status.st_ctime_ns % 1_000_000_000 == 0
    if now - latest < (_COARSE_TICK_NS if coarse else _TICK_NS) and latest - now < _COARSE_TICK_NS:
        return None
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join([platform.node(), *map(str, parts)])


def recall() -> dict[str, str]:
    """Return identity -> digest of what was verified; a file that is not ours or damaged knows nothing."""
    where = place()
    try:
        raw = None if where is None else read_json(where)
    except (OSError, ValueError):
        return {}
    files = raw.get("files") if isinstance(raw, dict) and raw.get("format") == _FORMAT else None
    if not isinstance(files, dict):
        return {}
    return {key: value for key, value in files.items() if isinstance(value, str)}


def remember(digests: Mapping[str, str]) -> None:
    """Add identities and digests; where that cannot be written, files are only read again."""
    where = place()
    if where is None or not digests:
        return
    known = {key: value for key, value in recall().items() if key not in digests}
    kept = dict([*known.items(), *digests.items()][-_MOST:])
    with contextlib.suppress(OSError):
        where.parent.mkdir(parents=True, exist_ok=True)
        write_json(where, {"format": _FORMAT, "files": kept})
