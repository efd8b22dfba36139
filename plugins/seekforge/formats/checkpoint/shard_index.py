"""Which shards make up a checkpoint: the index, or the names of the files where there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from seekforge.common.errors import CheckpointError
from seekforge.common.paths import name_fault
from seekforge.common.reading import LISTING_BYTES, read_bytes
from seekforge.formats.checkpoint.shard_header import AGAIN, Shard, parse_listing

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
_NUMBERED: Final = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


def read_index(path: Path) -> dict[str, str]:
    """Return weight_map (tensor name -> shard file name) of an index file.

    Raises:
        CheckpointError: it cannot be read, is no regular file, too large, or malformed.
    """
    return parse_index(read_listing(path), path)


def parse_index(raw: bytes, path: Path) -> dict[str, str]:
    """Return weight_map (tensor name -> shard file name) of an index."""
    index = parse_listing(raw, str(path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no 'weight_map' of tensor names to shard files; {AGAIN}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_file_name(file):
            raise CheckpointError(
                f"{path}: puts {tensor!r} in {file!r}, expected the plain name of a file in the same folder; {AGAIN}"
            )
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    return name_fault(name) is None and "/" not in name


def require_shards(folder: Path, files: list[str]) -> None:
    """Check that every shard of an index is there.

    Raises:
        CheckpointError: one is missing.
    """
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(files)} shards)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder / missing[0]}: is missing{more}, but {INDEX_FILE} names it; finish the download"
        )


def shards_without_index(present: Iterable[str], folder: Path) -> list[str]:
    """Choose the shards of a folder that has no index.

    Args:
        present: names of the safetensors files in it.
        folder: what to call it in an error.

    Returns:
        `model.safetensors` where it is, else the only file, else the whole of one numbered series, in its order.

    Raises:
        CheckpointError: there are none, some of a series are missing, or it cannot be said which files belong together.
    """
    files = sorted(present)
    if SINGLE_FILE in files:
        return [SINGLE_FILE]
    series: dict[tuple[str, int], dict[int, str]] = {}
    for file in files:
        match = _NUMBERED.fullmatch(file)
        if match is not None:
            series.setdefault((match[1], int(match[3])), {})[int(match[2])] = file
    if len(files) == 1 and not series:
        return files
    if not files:
        raise CheckpointError(
            f"{folder}: holds neither {INDEX_FILE} nor a safetensors file; pass a Hugging Face checkpoint folder, "
            "or finish its download"
        )
    if len(series) != 1 or len(files) != sum(map(len, series.values())):
        raise CheckpointError(
            f"{folder}: has no {INDEX_FILE}, and of its {len(files)} safetensors files ({files[0]}, {files[-1]}) it "
            "cannot be said which belong together; download the index too"
        )
    ((stem, count), numbered) = next(iter(series.items()))
    first = 0 if 0 in numbered else 1
    missing = next(
        (number for number in range(first, first + min(count, len(numbered) + 1)) if number not in numbered), None
    )
    if missing is not None or len(numbered) != count:
        raise CheckpointError(
            f"{folder}: has {len(numbered)} of the {count} shards {stem}-*-of-{count} and no {INDEX_FILE}"
            f"{'' if missing is None else f'; number {missing} is missing'}; finish the download"
        )
    return [numbered[number] for number in sorted(numbered)]


def locate(shards: Mapping[str, Shard]) -> dict[str, str]:
    """Return tensor name -> name of the shard that holds it.

    Raises:
        CheckpointError: two shards hold the same tensor.
    """
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for tensor in shard.tensors:
            if tensor in seen:
                raise CheckpointError(
                    f"{shard.path}: holds {tensor!r}, which {seen[tensor]} holds too; "
                    "expected each tensor once, remove the stale shard or download the folder again"
                )
            seen[tensor] = file
    return seen


def match_index(weight_map: Mapping[str, str], shards: Mapping[str, Shard], path: Path) -> None:
    """Check that index and headers put the same tensors in the same shards, each once.

    Raises:
        CheckpointError: they do not.
    """
    seen = locate(shards)
    for tensor, file in weight_map.items():
        shard_of = seen.get(tensor)
        if shard_of != file:
            where = f"{shard_of} holds it" if shard_of else "no shard holds it"
            raise CheckpointError(
                f"{path}: puts {tensor!r} in {file}, but {where}; index and shards are of different downloads, "
                "download the folder again"
            )
    extra = seen.keys() - weight_map.keys()
    if extra:
        tensor = min(extra)
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{path}: does not list {tensor!r}{more}, which {seen[tensor]} holds; "
            "index and shards are of different downloads, download the folder again"
        )


def read_listing(path: Path) -> bytes:
    """Return the bytes of an index file.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or too large.
    """
    try:
        return read_bytes(path, most=LISTING_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check it and its permissions") from None
