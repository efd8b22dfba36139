"""A server on 127.0.0.1 that gives the files of a folder as the Hugging Face hub does, and can be made to fail."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.lying_server import Lie

from seekforge.common.files import sha256_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server does, and what was requested of it.

    Attributes:
        folder: the repository's files.
        name: the repository's name.
        revisions: the revisions that it has.
        ranges: answers range requests with parts; False: with everything, as a plain file server does.
        lists: knows the API's list of files.
        listed: file name -> what the list says of it beside the rest: digests of a file on Xet, say.
        commit: the commit that the API says a revision is.
        pages: further lists that each list says there are.
        token: needed for everything; None: nothing is.
        redirects: gives shards from another address, as the hub does.
        lies: file name, or "list" -> what is sent where it is downloaded, from its content and the first and last byte
            asked for.
        facts: file name -> what is said of it beside the truth, or in its place.
        cut: file name -> how many bytes its answers end after, without warning.
        sent: body bytes so far.
        requests: (method, path, range, authorization) of each request.
        url: the server's address.
    """

    folder: Path
    name: str = "owner/name"
    revisions: tuple[str, ...] = ("main", COMMIT)
    ranges: bool = True
    lists: bool = True
    listed: dict[str, dict[str, object]] = field(default_factory=dict)
    commit: str = COMMIT
    pages: int = 0
    token: str | None = None
    redirects: bool = False
    lies: dict[str, Lie] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve `folder` as owner/name for as long as the block runs."""
    hub = Hub(folder)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        # little on the way: what nobody reads is then not sent
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.state, urllib.parse.unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            anonymous = self.headers.get("Authorization") is None
            self._refuse(401 if anonymous else 403, "GatedRepo")
            return
        api = re.fullmatch(rf"/api/models/{hub.name}(?:/revision/([^/]+))?", path)
        if api is not None and hub.lists:
            names = [str(p.relative_to(hub.folder)) for p in sorted(hub.folder.rglob("*")) if p.is_file()]
            answer = {"id": hub.name, "sha": hub.commit, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body=body)
            return
        if re.fullmatch(rf"/api/models/{hub.name}/tree/[^/]+", path) and hub.lists:
            files = [p for p in sorted(hub.folder.rglob("*")) if p.is_file()]
            listed = [
                {"type": "file", "path": str(p.relative_to(hub.folder)), "size": p.stat().st_size, "oid": "0" * 40}
                | hub.listed.get(p.name, {})
                for p in files
            ]
            more = {"Link": f'<{hub.url}{self.path}>; rel="next"'} if hub.pages else {}
            hub.pages = max(0, hub.pages - 1)
            headers = {"Content-Type": "application/json", **more}
            if "list" in hub.lies:
                self._lie("list", None)
            else:
                self._send(200, json.dumps(listed).encode(), headers, body=body)
            return
        file = re.fullmatch(rf"/(cdn/)?{hub.name}/resolve/([^/]+)/(.+)", path)
        if file is None:
            self._refuse(404, "RepoNotFound")
        elif file[2] not in hub.revisions:
            self._refuse(404, "RevisionNotFound")
        elif not (hub.folder / file[3]).is_file():
            self._refuse(404, "EntryNotFound")
        elif hub.redirects and not file[1] and file[3].endswith(".safetensors"):
            self._send(302, b"", {"Location": f"{hub.url}/cdn{self.path}", **self._facts(file[3])}, body=body)
        else:
            self._file(file[3], body=body)

    def _facts(self, name: str) -> dict[str, str]:
        path = self.state.folder / name
        digest = sha256_file(path) if name.endswith(".safetensors") else hashlib.sha1(name.encode()).hexdigest()
        facts = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "X-Linked-Size": str(path.stat().st_size)}
        return facts | self.state.facts.get(name, {})

    def _file(self, name: str, *, body: bool) -> None:
        path = self.state.folder / name
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        facts = self._facts(name)
        if name in self.state.lies and body:
            self._lie(name, match)
            return
        with path.open("rb") as file:
            if match is None or not self.state.ranges:
                self._send(200, file.read() if body else b"", facts, body=body, length=size, name=name)
                return
            start, stop = int(match[1]), min(int(match[2] or size - 1), size - 1)
            file.seek(start)
            facts["Content-Range"] = f"bytes {start}-{stop}/{size}"
            self._send(206, file.read(stop + 1 - start), facts, body=body, name=name)

    def _lie(self, name: str, asked: re.Match[str] | None) -> None:
        self.close_connection = True
        start, stop = (int(asked[1]), int(asked[2]) + 1 if asked[2] else None) if asked else (0, None)
        with suppress(OSError):  # nobody listens any more
            file = self.state.folder / name
            for piece in self.state.lies[name](file.read_bytes() if file.is_file() else b"", start, stop):
                self.wfile.write(piece)
                self.wfile.flush()
                self.state.sent += len(piece)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": "no\nsuch thing"[:2]}, body=True)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        *,
        body: bool,
        length: int | None = None,
        name: str = "",
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if not body:
            return
        most = self.state.cut.get(name)
        piece = 1 << 16
        for start in range(0, len(content), piece):
            part = content[start : start + piece]
            if most is not None and start + len(part) > most:
                part = part[: most - start]
                self.close_connection = True
            try:
                self.wfile.write(part)
                self.wfile.flush()
            except OSError:  # nobody listens any more
                self.close_connection = True
                return
            self.state.sent += len(part)
            if self.close_connection and most is not None:
                return
