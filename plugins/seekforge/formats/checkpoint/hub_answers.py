"""What a server tells huggingface_hub while that downloads: looked at before it is believed, and bounded.

The library makes names of files of digests and commits, from headers and from its list of a repository's files alike,
and reads a list, and what comes with an error, to the end. It makes its HTTP client anew when a connection fails, so
what looks at answers belongs to every client that it makes meanwhile.
"""

from __future__ import annotations

import importlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from seekforge.common.errors import CheckpointError
from seekforge.common.reading import parse_json
from seekforge.formats.checkpoint.hub_files import Repo

#: An ETag, or a commit: with a slash, or of dots alone, it would be the path of something else.
_PLAIN: Final = re.compile(r'(?:W/)?"?[\w+=:-][\w.+=:-]{0,199}"?')
#: A commit, a git object, a SHA-256 or a xet hash.
_DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
#: Keys of lists of files that have one.
_DIGEST_KEYS: Final = frozenset(("sha", "oid", "blobId", "sha256", "xetHash"))
#: Lists of one repository, and bodies of errors, all together; a released model's list has 100 kB.
_MAX_BYTES: Final = 64 << 20
#: The library lists a thousand files at a time, for as long as there is a next list.
_MAX_LISTS: Final = 100
#: What takes longer than this has to come at this rate.
_PATIENCE_S: Final = 60.0
_LEAST_BYTES_PER_S: Final = 16 << 10
#: How long a server that is busy may ask to wait, each of a few times.
_LONGEST_WAIT_S: Final = 600


@contextmanager
def checked_answers(hub: Any, repo: Repo) -> Iterator[Answers]:
    """Refuse answers to the library that would lead out of its cache, or do not end, for as long as the block runs.

    Args:
        hub: huggingface_hub, or what stands in for it.
        repo: what errors name.
    """
    answers = Answers(repo)
    if not hasattr(hub, "utils"):
        yield answers
        return
    http: Any = importlib.import_module("huggingface_hub.utils._http")
    make_client = http._GLOBAL_CLIENT_FACTORY

    def watched(client: Any) -> Any:
        client.event_hooks["request"].append(answers.ask_plainly)
        client.event_hooks["response"].append(answers.check)
        return client

    watched(http.get_session())
    # not by the library's own function for this: it closes the client that others may be using
    http._GLOBAL_CLIENT_FACTORY = lambda: watched(make_client())
    try:
        yield answers
    finally:
        http._GLOBAL_CLIENT_FACTORY = make_client
        for hooks, ours in zip(
            map(http.get_session().event_hooks.get, ("request", "response")), (answers.ask_plainly, answers.check)
        ):
            if ours in hooks:  # else the client is a later one
                hooks.remove(ours)


class Answers:
    """What looks at answers. Until `begin_files` is called all of them are lists, whatever their addresses say: those
    of a next list, and where a list is moved to, are chosen by the server.

    Attributes:
        refused: what was refused: the library may raise an error of its own for an answer that it does not get.
    """

    def __init__(self, repo: Repo) -> None:
        self.refused: list[CheckpointError] = []
        self._repo, self._are_lists = repo, True
        self._left, self._lists = _MAX_BYTES, 0
        self._lock, self._stopped = threading.Lock(), False

    def stop(self) -> None:
        """Let every thread of the library that asks for something or takes a piece of it end there."""
        self._stopped = True

    def go_on(self) -> None:
        """Refuse to, once it was stopped."""
        if self._stopped:
            raise CheckpointError(f"{self._repo}: the download was interrupted; run the command again to go on")

    def begin_files(self) -> None:
        """From here on files come, which end where their progress bar does."""
        self._are_lists = False

    def ask_plainly(self, request: Any) -> None:
        """Ask for no coding: a few bytes of one may be gigabytes."""
        self.go_on()
        request.headers["Accept-Encoding"] = "identity"

    def check(self, response: Any) -> None:
        """Look at what came before the library does."""
        try:
            self._check_headers(response.headers)
            if not self._are_lists and response.status_code < 300:
                return
            coding = response.headers.get("content-encoding", "identity").strip().lower()
            if coding not in ("identity", ""):
                raise self._fault(f"answers with Content-Encoding {coding[:60]!r}, though none was asked for")
            response.stream = self._bounded(response.stream, type(response).__module__.partition(".")[0])
            if self._are_lists and response.status_code < 300:
                self._check_list(response.read())
        except CheckpointError as error:
            self.refused.append(error)
            raise

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._repo}: the server {what}; try again later, or pass the folder of a download")

    def _check_headers(self, headers: Any) -> None:
        for header in ("etag", "x-linked-etag", "x-repo-commit"):
            value = headers.get(header)
            if value is not None and not _PLAIN.fullmatch(value):
                raise CheckpointError(
                    f"{self._repo}: the server's {header} is {value[:60]!r}, expected the digest of a file"
                )
        wait = headers.get("retry-after", "") + headers.get("ratelimit", "")
        if any(len(number) > 9 or int(number) > _LONGEST_WAIT_S for number in re.findall(r"\d+", wait, re.ASCII)):
            for header in ("retry-after", "ratelimit"):  # the library would wait for as long as it is told
                headers.pop(header, None)

    def _check_list(self, content: bytes) -> None:
        self._lists += 1
        if self._lists > _MAX_LISTS:
            raise self._fault(f"has more than {_MAX_LISTS} lists of its files, which no model has")
        try:
            waiting = [parse_json(content)]
        except ValueError:
            raise self._fault("answers with a list of files that is no JSON") from None
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting.extend(value)
            if not isinstance(value, dict):
                continue
            waiting.extend(value.values())
            for key in _DIGEST_KEYS.intersection(value):
                digest = value[key]
                if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
                    said = digest if isinstance(digest, str) else type(digest).__name__
                    raise CheckpointError(
                        f"{self._repo}: {key} in the server's list of files is {said[:60]!r}, expected a digest"
                    )

    def _bounded(self, stream: Any, library: str) -> Any:
        """Return a body of the HTTP client `library` that is given up where it is too long or comes too slowly."""
        count = self._count

        class Bounded(importlib.import_module(library).SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                began, come = time.monotonic(), 0
                for piece in stream:
                    come += len(piece)
                    count(len(piece), time.monotonic() - began, come)
                    yield piece

            def close(self) -> None:
                stream.close()

        return Bounded()

    def _count(self, num_bytes: int, seconds: float, come: int) -> None:
        with self._lock:
            self._left -= num_bytes
        if self._left < 0:
            raise self._fault(f"says more than {_MAX_BYTES >> 20} MiB about its files, which those of no model need")
        if seconds > _PATIENCE_S + come / _LEAST_BYTES_PER_S:
            raise self._fault(f"tells about its files too slowly ({come:,} bytes in {seconds:.0f} s)")
