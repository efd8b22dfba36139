"""Checkpoints of the Hugging Face hub: named as people name them, read by their headers, downloaded only for weights.

A safetensors file says at its beginning what it holds, so a model of 690 GB is described by some 15 MB: `headers`
fetches those by range requests into a temporary folder in which every shard has its true size and holes for weights,
and whoever opens checkpoints opens it as any other. `download` fetches everything, with huggingface_hub's progress
bars, cache and resuming.

huggingface_hub gives names, addresses, tokens, retries, errors, its cache and downloads. Its own readers of headers are
not used: `get_safetensors_metadata` keeps neither the header's bytes nor the file's size, which the digest of a
checkpoint is made of, and reads the whole of a file from a server that ignores ranges.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import io
import logging
import os
import re
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import CheckpointError, EnvironmentFault, SeekforgeError
from seekforge.common.paths import name_fault, real_path
from seekforge.common.reading import parse_json, read_json
from seekforge.common.requirements import install_module
from seekforge.common.temporary import temporary_folder
from seekforge.formats.checkpoint.hub_answers import Answers, checked_answers
from seekforge.formats.checkpoint.hub_files import Files, Repo, endpoint, explained, in_a_thread
from seekforge.formats.checkpoint.quantization_forms import MODELOPT_FILE, says_nothing_of_weights
from seekforge.formats.checkpoint.tools_preamble import ENCODING_FILE
from seekforge.formats.program import TEMPLATE_FILE, TEXT_FILES

_NAME: Final = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REPO: Final = re.compile(rf"({_NAME})(?:@(\S+))?")
#: Two slashes become one where a path was made of the URL.
_URL: Final = re.compile(r"(https?):/+([^/?#]+)/([^?#]*)(?:[?#].*)?")
_HOSTS: Final = ("huggingface.co", "hf.co", "www.huggingface.co")
#: What of a repository is downloaded.
PATTERNS: Final = ["*.safetensors", "*.json", ENCODING_FILE, TEMPLATE_FILE]
_THREADS: Final = 8
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
#: Files beside the weights, and headers of shards, have no more than that.
_BESIDE_WEIGHTS_BYTES: Final = 1 << 30
#: An index may have been left as it was by who converted weights: from codes to BF16 they became four times as large.
_MOST_TIMES: Final = 4
#: Shards of a repository: each takes a request. The 671B model has 163.
_MAX_SHARDS: Final = 10_000


def parse_repo(source: str, revision: str | None = None) -> Repo | None:
    """Return the repository that `source` names, or None where it names a folder.

    Args:
        source: `owner/name`, `owner/name@revision`, `hf://owner/name`, or the address of a page of the repository. A
            local folder of the same spelling wins.
        revision: given beside it; must not contradict one within.

    Raises:
        CheckpointError: an address that is none of a model, or two revisions.
    """
    text = source.strip()
    if Path(text).exists():
        return None
    url = _URL.fullmatch(text)
    if url is None and text.partition("/")[0] in _HOSTS:
        url = _URL.fullmatch(f"https://{text}")
    if url is not None:
        repo = _of_url(source, url[2], url[3])
    else:
        match = _REPO.fullmatch(re.sub(r"^hf:/+", "", text).rstrip("/"))
        if match is None:
            return None
        repo = Repo(match[1], match[2])
    if revision is None or revision == repo.revision:
        return repo
    if repo.revision is not None:
        raise CheckpointError(
            f"{source}: names revision {repo.revision}, and --revision is {revision}; leave one of them out"
        )
    return replace(repo, revision=revision)


def _of_url(source: str, host: str, path: str) -> Repo:
    parts = [urllib.parse.unquote(part) for part in path.split("/") if part]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    if len(parts) < 2 or parts[0] in ("datasets", "spaces", "api") or not re.fullmatch(_NAME, "/".join(parts[:2])):
        raise CheckpointError(f"{source}: is no address of a model, expected https://huggingface.co/OWNER/NAME")
    if host not in _HOSTS:
        hub_host = urllib.parse.urlsplit(endpoint(_library(source))).netloc
        if host != hub_host:
            raise CheckpointError(
                f"{source}: {host} is not the hub that is asked here ({hub_host}); set HF_ENDPOINT to it "
                f"and pass {'/'.join(parts[:2])}"
            )
    revision = None
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "commit"):
        # refs/pr/1 is a revision with slashes when it is not written with %2F
        revision = "/".join(parts[3:6]) if parts[3] == "refs" and len(parts) > 5 else parts[3]
    return Repo("/".join(parts[:2]), revision)


def _library(source: str) -> Any:
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise EnvironmentFault(
            f"{source}: no such folder; to read it as a Hugging Face repository {install_module('huggingface_hub')}, "
            "or pass the folder of a downloaded checkpoint"
        ) from None
    for name in ("constants", "utils"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"huggingface_hub.{name}")
    if hasattr(hub, "utils") and not hasattr(hub.utils, "http_stream_backoff"):
        raise EnvironmentFault(f"{source}: huggingface_hub is too old here; {install_module('huggingface_hub')}")
    # every retry is three lines of it, and what is given up after them is one of ours
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    return hub


# --- weights ----------------------------------------------------------------------------------------------------


def resolve(source: str | os.PathLike[str], *, revision: str | None = None, quiet: bool = False) -> Path:
    """Return the local folder of a checkpoint with its weights, downloading it if `source` names a repository.

    Args:
        source: a folder, or what `parse_repo` takes. A whole snapshot in the hub's cache is used as it is, without
            asking the network.
        revision: a branch, tag or commit of the repository; None takes its main branch.
        quiet: whether to show no progress bars.

    Raises:
        CheckpointError: the repository cannot be had, or the disk has no room for it.
        EnvironmentFault: huggingface_hub is not installed.
    """
    repo = parse_repo(str(source), revision)
    return Path(source) if repo is None else download(repo, quiet=quiet)


def download(repo: Repo, *, quiet: bool = False) -> Path:
    """Return the folder of a snapshot, from the cache or the network. Errors as `resolve`."""
    hub = _library(str(repo))
    cached = _snapshot(hub, repo)
    if cached is not None and _is_whole(cached):
        return cached
    most = _check_room(hub, repo) if hasattr(hub, "constants") else None
    if quiet and hasattr(hub, "utils"):
        hub.utils.disable_progress_bars()
    with checked_answers(hub, repo) as answers:
        more: dict[str, Any] = {}
        if most is not None:
            bar = _bar_with_an_end(hub, repo, most, answers)
            more = {"endpoint": endpoint(hub), "tqdm_class": bar}
        try:
            load = partial(hub.snapshot_download, repo.name, revision=repo.revision, allow_patterns=PATTERNS, **more)
            folder = Path(in_a_thread(load).result())
        except SeekforgeError:
            raise
        except Exception as error:  # of a dozen classes, ours, of its HTTP client's and of the operating system
            raise (answers.refused[0] if answers.refused else explained(error, repo)) from None
        finally:  # an interrupt does not wait for the library's threads: that is to wait for eight shards
            answers.stop()
    _check_blobs(folder, repo)
    return folder


def _bar_with_an_end(hub: Any, repo: Repo, most: int, answers: Answers) -> type:
    """Return a progress bar of the library that refuses more bytes: it writes whatever comes, as long as it comes.

    The first is made when the library has listed all files.
    """

    class Bar(hub.utils.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            answers.begin_files()
            self._counts_bytes, self._seen = options.get("unit") == "B", 0
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> bool | None:
            answers.go_on()
            self._seen += n or 0
            if self._counts_bytes and self._seen > most:
                raise CheckpointError(
                    f"{repo}: {most / 1e9:,.1f} GB have come and it does not end: far more than its index says, or no "
                    "room is left; try again later, or pass the folder of a downloaded checkpoint"
                )
            return super().update(n)

    return Bar


def _check_blobs(folder: Path, repo: Repo) -> None:
    """Compare what was downloaded with its SHA-256, which is the name that the hub's cache gives to a large file.

    The library compares sizes alone; a part that came from elsewhere in a file has the right one.
    """
    files = {path: real_path(path) for path in sorted(folder.rglob("*")) if path.is_symlink()}
    named = {path: blob for path, blob in files.items() if _SHA256.fullmatch(blob.name)}
    stop = threading.Event()

    def digest(blob: Path) -> str:
        with _Stoppable(blob, stop) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS, "hub") as pool:
        try:
            digests = pool.map(digest, named.values())
            damaged = [path for (path, blob), one in zip(named.items(), digests, strict=True) if one != blob.name]
        finally:
            stop.set()  # an interrupt reaches this thread alone
    for path in damaged:
        for one in (named[path], path):
            one.unlink(missing_ok=True)
    if damaged:
        raise CheckpointError(
            f"{repo}: {damaged[0].relative_to(folder)} is not what the hub says that it is (its SHA-256 is another): "
            "it was damaged on the way and was removed, run the command again"
        )


class _Stoppable(io.FileIO):
    """A file that is read until somebody says to stop."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path)
        self._stop = stop

    def readinto(self, buffer: Any, /) -> int:
        if self._stop.is_set():
            raise InterruptedError(errno.EINTR, "nobody waits for it any more")
        return super().readinto(buffer)


def _snapshot(hub: Any, repo: Repo) -> Path | None:
    """Return what the cache has of a repository, whole or in part."""
    try:
        return Path(
            hub.snapshot_download(repo.name, revision=repo.revision, allow_patterns=PATTERNS, local_files_only=True)
        )
    except Exception:  # not in the cache
        return None


def _is_whole(folder: Path) -> bool:
    """Whether no file is missing that the folder itself says belongs to it. Broken links are missing files."""
    # imported where it is needed, here and below: what serves an engine in a folder reads no checkpoint
    from seekforge.formats.checkpoint.shard_index import INDEX_FILE, read_index, shards_without_index

    if not (folder / "config.json").is_file():
        return not any(folder.iterdir())  # nothing to judge by: the reader says what is wrong
    if (folder / INDEX_FILE).is_file():
        try:
            files = read_index(folder / INDEX_FILE).values()
        except (OSError, CheckpointError):
            return False
        return all((folder / file).is_file() for file in set(files))
    try:
        present = [path.name for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file()]
        return bool(shards_without_index(present, folder))
    except CheckpointError:
        return False


def _check_room(hub: Any, repo: Repo) -> int:
    """Return the most bytes that a download may take, and refuse one that does not fit."""
    cache = Path(hub.constants.HF_HUB_CACHE)
    where = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(where).free
    needed = _declared_bytes(Files(hub, repo))
    if needed is not None and needed > free:
        raise CheckpointError(
            f"{repo}: has {needed / 1e9:,.0f} GB of weights and {where} has {free / 1e9:,.0f} GB free; set HF_HOME "
            "to a folder on a larger disk, or pass the folder of a downloaded checkpoint"
        )
    room = max(free * 9 // 10, needed or 0)
    return room if needed is None else min(_MOST_TIMES * needed + _BESIDE_WEIGHTS_BYTES, room)


def _declared_bytes(files: Files) -> int | None:
    """Return how many bytes of weights a repository's index says that there are; None where it does not say."""
    from seekforge.formats.checkpoint.shard_index import INDEX_FILE

    content = files.content(INDEX_FILE)
    try:
        return None if content is None else int(parse_json(content)["metadata"]["total_size"])
    except (ValueError, KeyError, TypeError):
        return None


# --- headers ----------------------------------------------------------------------------------------------------


@contextmanager
def headers(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    config_only: bool = False,
    say: Callable[[str], None] | None = None,
) -> Iterator[Path]:
    """Give the folder of a checkpoint for as long as the block runs; of a repository without its weights.

    Args:
        source: a folder, which is given as it is, or what `parse_repo` takes.
        revision: the argument of `resolve`.
        config_only: fetch config.json alone, and where it says nothing of the weights, the file in which ModelOpt does.
        say: called with the name of what is fetched.

    Raises:
        CheckpointError: the repository cannot be had.
        EnvironmentFault: huggingface_hub is not installed.
    """
    repo = parse_repo(str(source), revision)
    if repo is None:
        yield Path(source)
        return
    hub = _library(str(repo))
    cached = _snapshot(hub, repo)
    if cached is not None and (_is_whole(cached) or (config_only and (cached / "config.json").is_file())):
        yield cached
        return
    with temporary_folder("seekforge-hub") as folder:
        try:
            if say is not None:
                say(f"read {'config.json' if config_only else 'headers'} of {repo} from the hub")
            _fetch(Files(hub, repo), folder, config_only=config_only)
            yield folder
        except SeekforgeError as error:  # of whoever reads the folder, too: it has no place that a user knows
            raise type(error)(str(error).replace(str(folder), str(repo))) from None


def _fetch(files: Files, folder: Path, *, config_only: bool) -> None:
    from seekforge.formats.checkpoint.shard_index import INDEX_FILE, SINGLE_FILE, read_index, shards_without_index

    if not files.fetch("config.json", folder / "config.json"):
        raise CheckpointError(f"{files.repo}: has no config.json; pass a repository with a model's checkpoint")
    if config_only:
        if _leaves_it_to_modelopt(folder / "config.json"):
            files.fetch(MODELOPT_FILE, folder / MODELOPT_FILE)
        return
    listed = files.listing()
    for name in (*TEXT_FILES, ENCODING_FILE, MODELOPT_FILE):
        if listed is None or name in listed:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.fetch(name, folder / name)
    if files.fetch(INDEX_FILE, folder / INDEX_FILE):
        shards = sorted(set(read_index(folder / INDEX_FILE).values()))
        if len(shards) > _MAX_SHARDS:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: names {len(shards):,} shards, expected at most {_MAX_SHARDS:,}; download "
                "the checkpoint and pass its folder"
            )
    elif listed is None:
        shards = [SINGLE_FILE]
    else:
        present = [name for name in listed if "/" not in name and name.endswith(".safetensors")]
        shards = shards_without_index([name for name in present if name_fault(name) is None], folder)
    with ThreadPoolExecutor(_THREADS, "hub") as pool:
        running = [pool.submit(files.fetch_header, name, folder / name) for name in shards]
        try:
            for future in running:
                future.result()
        except BaseException:
            files.stop()
            for future in running:
                future.cancel()
            raise


def _leaves_it_to_modelopt(path: Path) -> bool:
    try:
        config = read_json(path)
    except (OSError, ValueError):
        return False  # the reader says what is wrong with it
    return isinstance(config, dict) and says_nothing_of_weights(config)
