"""What of a checkpoint is carried along as it is: tokenizer files.

Looked at without torch, before any work: whatever is odd in a downloaded folder (a FIFO, a device) is said at once,
and nothing of it is opened.
"""

from __future__ import annotations

from pathlib import Path

from seekforge.common.errors import CheckpointError, ConfigError
from seekforge.common.paths import checkpoint_file
from seekforge.common.reading import LISTING_BYTES, SETTINGS_BYTES, check_regular, is_there, read_bytes
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.formats.program import TEMPLATE_FILE, TEXT_FILES


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
        CheckpointError: naming the first; or it is no folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder; pass the folder that holds {folder.name}")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in ("config.json", INDEX_FILE, *shards):
        path = folder / name
        if is_there(path):
            try:
                check_regular(path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again") from None


def text_files(folder: Path) -> list[str]:
    """Return the names of the files that are carried along, relative to the checkpoint folder.

    Raises:
        ConfigError: there is no tokenizer.
        CheckpointError: one is no regular file, leads out of the folder, or is too large.
    """
    names = present_text_files(folder)
    if TEXT_FILES[0] not in names:
        raise ConfigError(f"{folder / TEXT_FILES[0]}: missing; a checkpoint folder must hold the tokenizer")
    return names


def present_text_files(folder: Path) -> list[str]:
    """Return which of the files that are carried along are there; reads none of them.

    Raises:
        CheckpointError: as `text_files`.
    """
    names = [name for name in TEXT_FILES if is_there(folder / name)]
    for name in names:
        size = checkpoint_file(folder, name, error=CheckpointError).stat().st_size
        if size > _most_bytes(name):
            raise CheckpointError(f"{folder / name}: has {size:,} bytes, expected at most {_most_bytes(name):,}")
    return names


def read_text_file(folder: Path, name: str) -> bytes:
    """Return the bytes of one of these files, looked at once more: hours may have gone by since `text_files`.

    Raises:
        CheckpointError: as `text_files`.
    """
    path = checkpoint_file(folder, name, error=CheckpointError)
    try:
        raw = read_bytes(path, most=_most_bytes(name))
        if name == TEMPLATE_FILE:
            raw.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is no text ({error}); download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check it and its permissions") from None
    return raw


def _most_bytes(name: str) -> int:
    return SETTINGS_BYTES if name == TEMPLATE_FILE else LISTING_BYTES  # what reads an engine's has the same bounds
