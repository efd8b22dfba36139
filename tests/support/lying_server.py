"""A server on 127.0.0.1 that gives the files of a folder as the hub does, and of one of them what a test wants."""

from __future__ import annotations

import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

#: What is sent for a request: from the file's content, its first byte asked for and, if that is asked, the end.
Lie = Callable[[bytes, int, int | None], Iterable[bytes]]


@dataclass
class Liar:
    """The server's state.

    Attributes:
        folder: the repository's files.
        lie: what is sent for the files in `about`.
        about: names of files; "api" stands for the list of files.
        heads: the head of each request, in order.
        sent: bytes of lies so far.
        url: the server's address.
    """

    folder: Path
    lie: Lie
    about: tuple[str, ...]
    heads: list[str] = field(default_factory=list)
    sent: int = 0
    url: str = ""


def answer(status: str, body: bytes = b"", *headers: str, length: int | None = -1) -> bytes:
    """Return a whole answer; of a `length` None nothing is said of how long it is."""
    said = [] if length is None else [f"Content-Length: {len(body) if length == -1 else length}"]
    return "\r\n".join([f"HTTP/1.1 {status}", *said, *headers, "Connection: close", "", ""]).encode("latin-1") + body


def honest(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
    """Yield the right answer."""
    if start == 0 and stop is None:
        yield answer("200 OK", content)
    else:
        end = len(content) if stop is None else min(stop, len(content))
        yield answer(
            "206 Partial Content", content[start:end], f"Content-Range: bytes {start}-{end - 1}/{len(content)}"
        )


@contextmanager
def serve_lies(folder: Path, lie: Lie, about: tuple[str, ...]) -> Iterator[Liar]:
    """Serve `folder` as owner/name for as long as the block runs."""
    liar = Liar(folder, lie, about)
    listener = socket.create_server(("127.0.0.1", 0))
    liar.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    open_ones: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                open_ones.append(connection)
                threading.Thread(target=_talk, args=(liar, connection), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield liar
    finally:
        for one in (listener, *open_ones):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def _talk(liar: Liar, connection: socket.socket) -> None:
    with suppress(OSError), connection:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(65536)
            if not piece:
                return
            head += piece
        text = head.decode("latin-1")
        liar.heads.append(text)
        path = urllib.parse.unquote(text.split(" ")[1].partition("?")[0])
        asked = re.search(r"(?i)^range: bytes=(\d+)-(\d*)", text, re.MULTILINE)
        start, stop = (int(asked[1]), int(asked[2]) + 1 if asked[2] else None) if asked else (0, None)
        name = "api" if path.startswith("/api/") else path.partition("/resolve/")[2].partition("/")[2]
        file = liar.folder / name
        if name in liar.about:
            for piece in liar.lie(file.read_bytes() if file.is_file() else b"", start, stop):
                liar.sent += len(piece)
                connection.sendall(piece)
        elif file.is_file():
            for piece in honest(file.read_bytes(), start, stop):
                connection.sendall(piece)
        else:
            connection.sendall(answer("404 Not Found"))
