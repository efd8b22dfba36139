"""The files of one repository of the hub, by HTTP: small ones whole, shards by their headers; errors of it in one line.

Every answer is counted: a connection that breaks is asked again for the rest, a server that ignores ranges is read as
far as needed and no further, and nothing is read without a bound.

Source: safetensors format description (8 bytes of length, then JSON); RFC 9110, 14.4 (Content-Range).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import CheckpointError, SeekforgeError

#: Read of a shard at once: the header of a released shard has 85 kB.
_FIRST_BYTES: Final = 256 << 10
_MAX_HEADER_BYTES: Final = 100_000_000
_MAX_SMALL_BYTES: Final = 64 << 20
_TIMEOUT_S: Final = 30.0
#: Answers that bring nothing, one after the other, before a file is given up.
_TRIES: Final = 3


@dataclass(frozen=True)
class Repo:
    """A repository of the hub: `owner/name`, and a branch, tag or commit; None is its main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """As people write it."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def endpoint(hub: Any) -> str:
    """Return the address of the hub that is asked: HF_ENDPOINT as it is now, or the library's."""
    return (os.environ.get("HF_ENDPOINT") or str(hub.constants.ENDPOINT)).rstrip("/")


class Files:
    """The files of one repository, by HTTP."""

    def __init__(self, hub: Any, repo: Repo) -> None:
        self._hub, self.repo = hub, repo
        self._utils: Any = importlib.import_module("huggingface_hub.utils")
        self._commit: str | None = None

    def listing(self) -> list[str] | None:
        """Return the names of all files; None where the server does not tell."""
        api: Any = self._hub.HfApi(endpoint=endpoint(self._hub))
        revision = self._commit or self.repo.revision
        listings: tuple[Callable[[], Iterable[str]], ...] = (
            lambda: api.list_repo_files(self.repo.name, revision=revision),
            lambda: [file.rfilename for file in api.model_info(self.repo.name, revision=revision).siblings],
        )
        for ask in listings:
            with contextlib.suppress(Exception):  # a mirror knows one of these addresses, or serves files alone
                return list(ask())
        return None

    def fetch(self, name: str, place: Path) -> bool:
        """Write a small file to `place`; False: there is none."""
        content, total, idle = bytearray(), None, 0
        while idle < _TRIES:
            before = len(content)
            with self._request(name, start=len(content), stop=None) as answer:
                if answer is None:
                    return False
                if answer.start != len(content):
                    content.clear()
                total = answer.total
                for piece in answer.pieces:
                    content += piece
                    if len(content) > _MAX_SMALL_BYTES:
                        raise CheckpointError(
                            f"{self.repo}: {name} has more than {_MAX_SMALL_BYTES >> 20} MiB, which none of its kind "
                            "has; pass another repository"
                        )
            if total is None or len(content) >= total:
                place.write_bytes(content)
                return True
            idle = 0 if len(content) > before else idle + 1
        raise self._short(name, len(content), total)

    def fetch_header(self, name: str, place: Path) -> None:
        """Write a shard to `place` as its header and, to its true size, a hole."""
        content, total = self._beginning(name, _FIRST_BYTES)
        length = int.from_bytes(content[:8], "little")
        needed = 8 + length
        # what no header has is left to the reader of checkpoints, who says so
        if len(content) < needed <= total and length <= _MAX_HEADER_BYTES:
            content, total = self._beginning(name, needed)
        try:
            with place.open("wb") as file:
                file.write(content[: min(needed, len(content))] if length <= _MAX_HEADER_BYTES else content)
                file.truncate(total)
        except OSError as error:
            raise CheckpointError(
                f"{place}: cannot be made with the {total:,} bytes of the shard ({error.strerror}); set TMPDIR to "
                "a folder whose file system has files with holes"
            ) from None

    def _beginning(self, name: str, wanted: int) -> tuple[bytes, int]:
        """Return the first `wanted` bytes of a file, or all it has, and its size."""
        content = bytearray()
        total: int | None = None
        idle = 0
        while idle < _TRIES:
            before = len(content)
            with self._request(name, start=len(content), stop=wanted) as answer:
                if answer is None:
                    raise CheckpointError(f"{self.repo}: has no {name}, which its index names; pass another revision")
                if answer.total is None:
                    raise CheckpointError(
                        f"{self.repo}: the server does not say how large {name} is, and headers cannot be read "
                        "without; download the checkpoint and pass its folder"
                    )
                if answer.start != len(content):
                    content.clear()
                total = answer.total
                for piece in answer.pieces:
                    content += piece[: wanted - len(content)]
                    if len(content) >= min(wanted, total):
                        break  # what follows is not read: a server may send the whole file
            if len(content) >= min(wanted, total):
                return bytes(content), total
            idle = 0 if len(content) > before else idle + 1
        raise self._short(name, len(content), total)

    def _short(self, name: str, received: int, total: int | None) -> CheckpointError:
        return CheckpointError(
            f"{self.repo}: {name} ended after {received:,} bytes of {total or 0:,}, and then nothing "
            "came; try again later"
        )

    @contextmanager
    def _request(self, name: str, *, start: int, stop: int | None) -> Iterator[Answer | None]:
        """Ask for a file from byte `start` on, up to `stop`; None where there is no such file."""
        revision = urllib.parse.quote(self._commit or self.repo.revision or "main", safe="")
        url = f"{endpoint(self._hub)}/{self.repo.name}/resolve/{revision}/{urllib.parse.quote(name)}"
        headers = {**self._utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            with self._utils.http_stream_backoff(
                "GET", url, max_retries=2, headers=headers, timeout=_TIMEOUT_S
            ) as response:
                if response.status_code == 404 and name != "config.json":
                    yield None
                    return
                self._utils.hf_raise_for_status(response)
                commit = response.headers.get("x-repo-commit")
                if self._commit is None and commit and re.fullmatch(r"[0-9a-f]{40}", commit):
                    self._commit = commit  # a branch may move while we read
                yield Answer.of(response)
        except (SeekforgeError, GeneratorExit):
            raise
        except Exception as error:
            raise explained(error, self.repo, name) from None


@dataclass(frozen=True)
class Answer:
    """What a server sends: from where on, how large the whole file is, and the bytes as they come."""

    start: int
    total: int | None
    pieces: Iterator[bytes]

    @staticmethod
    def of(response: Any) -> Answer:
        length = response.headers.get("content-length", "")
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", "").strip())
            if match is None:
                raise CheckpointError(
                    f"the server answers a range request with Content-Range {response.headers.get('content-range')!r}"
                )
            return Answer(int(match[1]), None if match[2] == "*" else int(match[2]), _until_it_ends(response))
        return Answer(0, int(length) if length.isdigit() else None, _until_it_ends(response))


def _until_it_ends(response: Any) -> Iterator[bytes]:
    """Yield what comes; a connection that breaks ends it, and whoever counts the bytes asks for the rest."""
    try:
        yield from response.iter_bytes()
    except Exception:  # of the HTTP client, whichever huggingface_hub has
        return


# --- errors -----------------------------------------------------------------------------------------------------


def explained(error: Exception, repo: Repo, name: str | None = None) -> CheckpointError:
    """Return one line for an error of the hub's library."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = type(error).__name__
    what = str(repo) if name is None else f"{repo}: {name}"
    if kind in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") or "offline mode" in str(error).lower():
        return CheckpointError(
            f"{what}: no such folder, and it is not in the cache of the hub (offline mode is enabled by "
            "HF_HUB_OFFLINE); unset it, or pass the folder of a downloaded checkpoint"
        )
    if kind == "GatedRepoError" or status in (401, 403):
        return CheckpointError(
            f"{what}: no such folder, and the hub refuses it (status {status}): it is gated or private, or does not "
            "exist; set HF_TOKEN to a token of an account with access, or pass the folder of a downloaded checkpoint"
        )
    if kind == "RevisionNotFoundError":
        return CheckpointError(f"{repo.name}: has no revision {repo.revision!r}; pass a branch, tag or commit")
    if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return CheckpointError(f"{repo}: has no {name}; pass a repository with a model's checkpoint")
    if status == 404:
        return CheckpointError(
            f"{what}: no such folder, and the hub has none of that name (status 404); check the spelling, or pass the "
            "folder of a downloaded checkpoint"
        )
    return CheckpointError(
        f"{what}: no such folder, and the Hugging Face hub does not give it ({_reason(error)}); pass the folder "
        "of a downloaded checkpoint, or try again online"
    )


def _reason(error: Exception) -> str:
    """Return the first line of what an error says, or its class."""
    text = str(error).strip().partition("\n")[0].strip().rstrip(".:")
    return text[:300] or type(error).__name__
