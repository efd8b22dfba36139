"""What of a checkpoint is carried along as it is: tokenizer files and the folder of the chat encoder.

Looked at without torch, before any work: whatever is odd in a downloaded folder (a FIFO, a device, a folder that links
into itself) is said at once, and nothing of it is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from seekforge.common.errors import CheckpointError, ConfigError
from seekforge.common.paths import checkpoint_file, name_fault
from seekforge.common.reading import LISTING_BYTES, check_regular
from seekforge.formats.checkpoint.safetensors import INDEX_FILE
from seekforge.formats.program import ENCODING, TEXT_FILES

#: A chat encoder is some files; released ones have less than twenty of some kilobytes.
_MOST_FILES, _MOST_LEVELS, _MOST_BYTES = 1000, 8, 64 << 20
_CACHES = ("__pycache__",)


def check_files(folder: Path) -> None:
    """Refuse a checkpoint folder that holds something else where files are expected; reads none of them.

    Raises:
        CheckpointError, ConfigError: a file that a checkpoint needs is no regular one; a text file is larger than any
            or leads out of the folder.
    """
    check_weight_files(folder)
    text_files(folder)


def check_weight_files(folder: Path) -> None:
    """Refuse a checkpoint folder whose config.json, index or shards are no regular files; reads none of them.

    Raises:
        CheckpointError: naming the first.
    """
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in ("config.json", INDEX_FILE, *shards):
        path = folder / name
        if os.path.lexists(path):
            try:
                check_regular(path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again") from None


def text_files(folder: Path) -> list[str]:
    """Return the names of the files that are carried along, relative to the checkpoint folder.

    Raises:
        ConfigError: there is no tokenizer.
        CheckpointError: one is no regular file, leads out of the folder, or they are too many or too large.
    """
    names = [name for name in TEXT_FILES if os.path.lexists(folder / name)]
    if TEXT_FILES[0] not in names:
        raise ConfigError(f"{folder / TEXT_FILES[0]}: missing; a checkpoint folder must hold the tokenizer")
    for name in names:
        size = checkpoint_file(folder, name, error=CheckpointError).stat().st_size
        if size > LISTING_BYTES:
            raise CheckpointError(f"{folder / name}: has {size:,} bytes, expected at most {LISTING_BYTES:,}")
    if os.path.lexists(folder / ENCODING):
        names += sorted(_encoding_files(folder))
    return names


def _encoding_files(folder: Path) -> Iterator[str]:
    """Yield the files of the chat encoder, relative to `folder`; links to folders are not followed but refused."""
    total = count = 0
    waiting = [ENCODING]
    while waiting:
        place = waiting.pop()
        where = folder / place
        if where.is_symlink() or not where.is_dir():
            what = "is a link" if where.is_symlink() else "is no folder"
            raise CheckpointError(f"{where}: {what}, expected a folder with the chat encoder; copy the folder itself")
        if place.count("/") >= _MOST_LEVELS:
            raise CheckpointError(f"{where}: lies deeper than {_MOST_LEVELS} folders; download the checkpoint again")
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.name in _CACHES:
                    continue
                count += 1
                name = f"{place}/{entry.name}"
                fault = name_fault(name)
                if fault is not None:
                    raise CheckpointError(f"{folder}: the name of a file {fault}; download the checkpoint again")
                if entry.is_dir():  # a link to one too, which is refused when its turn comes
                    waiting.append(name)
                    continue
                total += checkpoint_file(folder, name, error=CheckpointError).stat().st_size
                if count > _MOST_FILES or total > _MOST_BYTES:
                    raise CheckpointError(
                        f"{folder / ENCODING}: holds more than {_MOST_FILES} files or {_MOST_BYTES >> 20} MiB, which "
                        "no chat encoder does; download the checkpoint again"
                    )
                yield name
