"""The files of one repository of the hub, by HTTP: small ones whole, shards by their headers; errors of it in one line.

Nothing that a server says is believed. Every answer is counted and held against what was asked: a connection that
breaks is asked again for the rest, a server that ignores ranges is read as far as needed and no further, one that
answers with other bytes, with more than it announced, in pieces of nothing or without an end is given up. What is read
has a bound in bytes and, as a server that says nothing is left alone by whoever waits for it, one in time.

Source: safetensors format description (8 bytes of length, then JSON); RFC 9110, 14.4 (Content-Range), 8.4
(Content-Encoding), 10.2.3 (Retry-After).
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from seekforge.common.errors import CheckpointError, SeekforgeError
from seekforge.common.reading import parse_json

#: Read of a shard at once: the header of a released shard has 85 kB.
_FIRST_BYTES: Final = 256 << 10
_MAX_HEADER_BYTES: Final = 100_000_000
_MAX_SMALL_BYTES: Final = 64 << 20
#: Read of one repository, all its files together: the 671B model's headers have 15 MB.
_MAX_BYTES: Final = 1 << 30
#: Without a byte before a connection is given up.
_TIMEOUT_S: Final = 30.0
#: A file that takes longer than this has to come at this rate.
_PATIENCE_S: Final = 120.0
_LEAST_BYTES_PER_S: Final = 16 << 10
#: Answers that bring nothing, one after the other, before a file is given up.
_TRIES: Final = 3
#: Answers that ask to come again, and how long they may ask to wait.
_BUSY: Final = (429, 500, 502, 503, 504)
_LONGEST_WAIT_S: Final = 8.0

_Result = TypeVar("_Result")


class _TooSlowError(CheckpointError):
    """What need not be asked for anything else."""


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
        self._left = _MAX_BYTES
        self._stopped = False
        self._fault = ""  # why, where it was not wanted
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Let all that is being read end, in threads that are left behind too."""
        self._stopped = True

    def listing(self) -> list[str] | None:
        """Return the names of all files; None where the server does not tell: a mirror may serve files alone."""
        revision = urllib.parse.quote(self._commit or self.repo.revision or "main", safe="")
        try:
            content, _ = self._read("its list of files", f"api/models/{self.repo.name}/revision/{revision}", None)
            names = [file["rfilename"] for file in parse_json(content)["siblings"]]
        except _TooSlowError:
            raise
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):
            return None
        return names if all(isinstance(name, str) for name in names) else None

    def content(self, name: str) -> bytes | None:
        """Return a small file; None: there is none."""
        try:
            return self._read(name, self._address(name), None)[0]
        except FileNotFoundError:
            return None

    def fetch(self, name: str, place: Path) -> bool:
        """Write a small file to `place`; False: there is none."""
        content = self.content(name)
        if content is None:
            return False
        place.write_bytes(content)
        return True

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
        try:
            content, total = self._read(name, self._address(name), wanted)
        except FileNotFoundError:
            raise CheckpointError(f"{self.repo}: has no {name}, which its index names; pass another revision") from None
        assert total is not None  # where a part is wanted
        return content, total

    def _address(self, name: str) -> str:
        revision = urllib.parse.quote(self._commit or self.repo.revision or "main", safe="")
        return f"{self.repo.name}/resolve/{revision}/{urllib.parse.quote(name)}"

    def _read(self, name: str, address: str, wanted: int | None) -> tuple[bytes, int | None]:
        """Return the first `wanted` bytes of what is at an address, or all of it, and its size if that is known.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it cannot be had.
        """
        content = bytearray()
        return self._in_time(name, content, lambda: self._collect(name, address, wanted, content))

    def _in_time(self, name: str, content: bytearray, work: Callable[[], _Result]) -> _Result:
        """Run `work` in a thread that is left behind when what it adds to `content` comes too slowly."""
        began, future = time.monotonic(), in_a_thread(work)
        while True:
            waited = time.monotonic() - began
            allowed = _PATIENCE_S + len(content) / _LEAST_BYTES_PER_S
            if self._stopped:
                raise self._ended(name)
            if waited > allowed:
                self._fault = self._fault or (
                    f"{self.repo}: {name} comes too slowly ({len(content):,} bytes in {waited:.0f} s); try again later"
                )
                self.stop()
                raise self._ended(name)
            try:
                return future.result(timeout=min(0.2, allowed - waited + 0.01))
            except TimeoutError:
                if future.done():  # meanwhile, or with a TimeoutError of its own
                    return future.result()

    def _ended(self, name: str) -> CheckpointError:
        """Return what to say of a file that is read no further: what has ended it, if another one did."""
        if self._fault:
            return _TooSlowError(self._fault)
        return CheckpointError(f"{self.repo}: {name} is not needed any more")

    def _collect(self, name: str, address: str, wanted: int | None, content: bytearray) -> tuple[bytes, int | None]:
        total: int | None = None
        idle = 0
        most = _MAX_SMALL_BYTES if wanted is None else wanted
        while idle < _TRIES:
            before = len(content)
            with self._request(name, address, start=len(content), stop=wanted) as answer:
                if answer.total is None and wanted is not None:
                    raise CheckpointError(
                        f"{self.repo}: the server does not say how large {name} is, and headers cannot be read "
                        "without; download the checkpoint and pass its folder"
                    )
                if None not in (total, answer.total) and total != answer.total:
                    raise self._lies(name, f"has {total:,} bytes, and then {answer.total:,}")
                if answer.start != len(content) or answer.total is None:
                    content.clear()
                total = answer.total
                enough = most if total is None else min(most, total)
                for piece in answer.pieces():
                    self._count(name, piece)
                    content += piece if wanted is None else piece[: wanted - len(content)]
                    if len(content) > most:
                        raise CheckpointError(
                            f"{self.repo}: {name} has more than {_MAX_SMALL_BYTES >> 20} MiB, which none of its kind "
                            "has; pass another repository"
                        )
                    if wanted is not None and len(content) >= enough:
                        break  # what follows is not read: a server may send the whole file
            if total is not None and wanted is None and len(content) > total:
                raise self._lies(name, f"has {total:,} bytes, and sends {len(content):,}")
            if len(content) >= enough or (total is None and not answer.broken):
                return bytes(content[:enough]), total
            idle = 0 if len(content) > before else idle + 1
        of = "" if total is None else f" of {total:,}"
        raise CheckpointError(
            f"{self.repo}: {name} ended after {len(content):,} bytes{of}, and then nothing came; try again later"
        )

    def _count(self, name: str, piece: bytes) -> None:
        with self._lock:
            self._left -= len(piece)
            if self._stopped:
                raise self._ended(name)
            if self._left < 0:
                raise CheckpointError(
                    f"{self.repo}: its config and headers have more than {_MAX_BYTES >> 20} MiB, which those of no "
                    "model have; pass another repository"
                )

    def _lies(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.repo}: {name} {what}: the server contradicts itself; try again later, or download the checkpoint "
            "and pass its folder"
        )

    @contextmanager
    def _request(self, name: str, address: str, *, start: int, stop: int | None) -> Iterator[Answer]:
        """Ask for what is at an address from byte `start` on, up to `stop`; FileNotFoundError where there is none."""
        headers = {**self._utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            with self._patiently(f"{endpoint(self._hub)}/{address}", headers) as response:
                if response.status_code == 404 and name != "config.json":
                    raise FileNotFoundError(name)
                if response.status_code >= 300:  # the library would read all that comes with an error
                    code = response.headers.get("x-error-code", "")
                    raise _refusal(self.repo, name, response.status_code, code, response.reason_phrase)
                commit = response.headers.get("x-repo-commit")
                if self._commit is None and commit and re.fullmatch(r"[0-9a-f]{40}", commit):
                    self._commit = commit  # a branch may move while we read
                try:
                    answer = Answer(response, start)
                except ValueError as error:
                    raise self._lies(name, f"is answered {error}") from None
                yield answer
        except (SeekforgeError, FileNotFoundError, GeneratorExit):
            raise
        except Exception as error:
            raise explained(error, self.repo, name) from None

    @contextmanager
    def _patiently(self, url: str, headers: dict[str, str]) -> Iterator[Any]:
        """Give the response of a server; one that is busy is asked again, but not waited for as long as it likes."""
        for left in reversed(range(_TRIES)):
            # the library waits as long as Retry-After says: of statuses it shall repeat none
            with self._utils.http_stream_backoff(
                "GET", url, max_retries=2, retry_on_status_codes=(), headers=headers, timeout=_TIMEOUT_S
            ) as response:
                wait = _wait_s(response.headers.get("retry-after"), _TRIES - left)
                if not left or response.status_code not in _BUSY or wait > _LONGEST_WAIT_S:
                    yield response
                    return
            time.sleep(wait)


def in_a_thread(work: Callable[[], _Result]) -> Future[_Result]:
    """Run `work` in a thread that nobody waits for; return what it will give."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed to who waits
            future.set_exception(error)

    threading.Thread(target=run, name="hub", daemon=True).start()
    return future


def _wait_s(retry_after: str | None, default_s: float) -> float:
    """Return how long a server asks to wait; a date of the calendar counts as too long."""
    if retry_after is None:
        return default_s
    return float(retry_after) if re.fullmatch(r"\d{1,6}", retry_after.strip()) else _LONGEST_WAIT_S + 1


class Answer:
    """What a server sends.

    Attributes:
        start: the first byte of the file that comes.
        total: bytes of the whole file; None where the server does not say.
        broken: whether it ended in a broken connection.
    """

    def __init__(self, response: Any, start: int) -> None:
        """Read what is said of the answer to a request for the bytes from `start` on.

        Raises:
            ValueError: it is no answer to that; the text says how.
        """
        self._response = response
        self.broken = False
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("identity", ""):  # a few bytes of it may be gigabytes
            raise ValueError(f"with Content-Encoding {coding[:60]!r}, though none was asked for")
        if response.status_code == 206:
            self.start, self.total = _range(response.headers.get("content-range", "").strip(), start)
            return
        if response.status_code != 200:
            raise ValueError(f"with status {response.status_code}, expected 200 or 206")
        length = response.headers.get("content-length", "")
        self.start, self.total = 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None

    def pieces(self) -> Iterator[bytes]:
        """Yield what comes; a connection that breaks ends it, and whoever counts the bytes asks for the rest."""
        try:
            yield from self._response.iter_raw()
        except Exception:  # of the HTTP client, whichever huggingface_hub has
            self.broken = True


def _range(said: str, start: int) -> tuple[int, int | None]:
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", said)
    if match is None:
        raise ValueError(f"with Content-Range {said[:60]!r}, expected bytes {start}-…")
    first, last, total = int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
    if first != start or last < first or (total is not None and last >= total):
        raise ValueError(f"with Content-Range {said!r}, expected bytes {start}-…")
    return start, total


# --- errors -----------------------------------------------------------------------------------------------------


def explained(error: Exception, repo: Repo, name: str | None = None) -> CheckpointError:
    """Return one line for an error of the hub's library."""
    kind = type(error).__name__
    if kind == "LocalEntryNotFoundError" and isinstance(error.__cause__, Exception):
        return explained(error.__cause__, repo, name)  # why it was not asked, or did not answer
    what = _what(repo, name)
    if kind in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") or "offline mode" in str(error).lower():
        return CheckpointError(
            f"{what}: no such folder, and it is not in the cache of the hub (offline mode is enabled by "
            "HF_HUB_OFFLINE); unset it, or pass the folder of a downloaded checkpoint"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    code = kind.removesuffix("Error").removeprefix("Remote")
    return _refusal(repo, name, status, code, _reason(error))


def _refusal(repo: Repo, name: str | None, status: int | None, code: str, reason: str) -> CheckpointError:
    """Return one line for a status and the hub's word for it (X-Error-Code), or for the `reason` of another error."""
    what = _what(repo, name)
    if code == "GatedRepo" or status in (401, 403):
        return CheckpointError(
            f"{what}: no such folder, and the hub refuses it (status {status}): it is gated or private, or does not "
            "exist; set HF_TOKEN to a token of an account with access, or pass the folder of a downloaded checkpoint"
        )
    if code == "RevisionNotFound":
        return CheckpointError(f"{repo.name}: has no revision {repo.revision!r}; pass a branch, tag or commit")
    if code == "EntryNotFound":
        return CheckpointError(f"{repo}: has no {name}; pass a repository with a model's checkpoint")
    if status == 404:
        return CheckpointError(
            f"{what}: no such folder, and the hub has none of that name (status 404); check the spelling, or pass the "
            "folder of a downloaded checkpoint"
        )
    if status == 429:
        return CheckpointError(
            f"{what}: the Hugging Face hub has had too many requests (status 429); try again later, set HF_TOKEN to a "
            "token of an account, or pass the folder of a downloaded checkpoint"
        )
    said = reason if status is None or str(status) in reason else f"status {status} {reason}".strip()
    return CheckpointError(
        f"{what}: no such folder, and the Hugging Face hub does not give it ({said}); pass the folder "
        "of a downloaded checkpoint, or try again online"
    )


def _what(repo: Repo, name: str | None) -> str:
    return str(repo) if name is None else f"{repo}: {name}"


def _reason(error: Exception) -> str:
    """Return the first line of what an error says, or its class."""
    text = str(error).strip().partition("\n")[0].strip().rstrip(".:")
    return text[:300] or type(error).__name__
