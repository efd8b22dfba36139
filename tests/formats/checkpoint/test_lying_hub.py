"""Whatever a server answers in place of a file, a command ends in one line, in bounded time and memory."""

from __future__ import annotations

import gzip
import importlib
import itertools
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.lying_server import Liar, Lie, answer, honest, serve_lies

from seekforge.common.errors import CheckpointError
from seekforge.common.system import peak_bytes
from seekforge.formats.checkpoint import hub_files
from seekforge.formats.checkpoint.hub import headers
from seekforge.formats.checkpoint.hub_files import Files, Repo
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.runtime.cli import main as cli

constants = pytest.importorskip("huggingface_hub.constants", reason="the hub extra is not installed")
CONFIG, SHARD, INDEX = "config.json", "model-00001-of-000003.safetensors", "model.safetensors.index.json"
#: Longest that anything here may take on a busy machine, and most memory, with the times below.
_MOST_S, _MOST_BYTES = 30.0, 400 << 20
#: What never ends by itself.
_SLOW = ("silence", "a head in drops", "a body in drops", "a part in drops")


@pytest.fixture
def served(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a server gives; what is waited for is short."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub_files, "_TIMEOUT_S", 10.0)
    monkeypatch.setattr(hub_files, "_PATIENCE_S", 20.0)
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    monkeypatch.chdir(tmp_path)
    for module in ("inspect.cli", "program.api", "checkpoint.source"):  # so that no import is timed
        importlib.import_module(f"seekforge.exporter.{module}")
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "served"))


@pytest.fixture
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a lie; one that takes for ever is not waited for long.

    Drops keep the timeout of one read: where the machine stands still between two of them, that would begin anew.
    """
    if request.param in _SLOW:
        monkeypatch.setattr(hub_files, "_PATIENCE_S", 1.5)
    if request.param == "silence":
        monkeypatch.setattr(hub_files, "_TIMEOUT_S", 0.5)
    return request.param


@pytest.fixture
def lying(served: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Liar]]:
    with ExitStack() as stack:

        def start(lie: Lie, *about: str) -> Liar:
            liar = stack.enter_context(serve_lies(served, lie, about))
            monkeypatch.setenv("HF_ENDPOINT", liar.url)
            return liar

        yield start


def refusal(*args: str) -> str:
    """Run a command that must end in one line, soon, and without much memory; return the line."""
    before, began = peak_bytes(), time.monotonic()
    result = CliRunner().invoke(cli.main, list(args))
    assert time.monotonic() - began < _MOST_S and peak_bytes() - before < _MOST_BYTES
    assert result.exit_code == 2, result.output + repr(result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and len(lines[0]) < 1000 and "\x1b" not in result.stderr
    return lines[0]


def status(line: str, *headers: str, body: bytes = b"no") -> Lie:
    return lambda content, start, stop: [answer(line, body, *headers)]


def ranged(said: str, cut: slice = slice(None)) -> Lie:
    return lambda content, start, stop: [answer("206 Partial Content", content[cut], f"Content-Range: {said}")]


def endless(head: bytes, piece: bytes, pause_s: float = 0.0) -> Lie:
    def lie(content: bytes, start: int, stop: int | None) -> Iterator[bytes]:
        yield head
        for _ in itertools.count():
            if pause_s:
                threading.Event().wait(pause_s)
            yield piece

    return lie


def silent(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
    threading.Event().wait(60)
    return []


def dripping_part(content: bytes, start: int, stop: int | None) -> Iterator[bytes]:
    """Be slow and nothing else: a connection that is lost between two drops is asked for the rest of them.

    The hub's library closes those of all threads when one of them cannot connect, such as what an earlier test left.
    """
    head = f"HTTP/1.1 206 Part\r\nContent-Range: bytes {start}-262143/9999999\r\n\r\n"
    return endless(head.encode(), b" ", 0.1)(content, start, stop)


def dripping_head(content: bytes, start: int, stop: int | None) -> Iterator[bytes]:
    for byte in itertools.cycle(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 60):
        yield bytes([byte])
        threading.Event().wait(0.1)


def other_size_each_time(content: bytes, start: int, stop: int | None) -> Iterator[bytes]:
    size = len(content) + start + 1000
    yield answer(
        "206 Partial Content", content[start : start + 20], f"Content-Range: bytes {start}-{start + 20}/{size}"
    )


_HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_BOMB = gzip.compress(bytes(64 << 20))

#: What is said of config.json, and a part of the line.
OF_CONFIG: dict[str, tuple[Lie, str]] = {
    "a page": (status("200 OK", "Content-Type: text/html", body=b"<html><b>Log in</b></html>"), "not valid JSON"),
    "nothing": (status("200 OK", body=b""), "not valid JSON"),
    "204": (status("204 No Content", body=b""), "status 204"),
    "401": (status("401 Unauthorized"), "set HF_TOKEN"),
    "403": (status("403 Forbidden"), "set HF_TOKEN"),
    "404": (status("404 Not Found"), "status 404"),
    "416": (status("416 Range Not Satisfiable"), "status 416"),
    "418 with escapes": (status("418 \x9b31m\xff teapot"), "status 418"),
    "429": (status("429 Too Many Requests"), "status 429"),
    "429 for a century": (status("429 Too Many Requests", "Retry-After: 3000000000"), "status 429"),
    "429 until a date": (status("429 Slow Down", "Retry-After: Fri, 31 Dec 2999 23:59:59 GMT"), "status 429"),
    "500": (status("500 Oops"), "status 500"),
    "503 for a day": (status("503 Busy", "Retry-After: 86400"), "status 503"),
    "an error without an end": (endless(b"HTTP/1.1 400 Bad\r\n\r\n", bytes(1 << 20)), "status 400"),
    "an error that is a bomb": (status("400 Bad", "Content-Encoding: gzip", body=_BOMB), "status 400"),
    "a warning of the hub": (status("403 No", "X-HF-Warning: a; \x1b[31mred"), "status 403"),
    "a redirect to itself": (status("302 Found", "Location: /owner/name/resolve/main/config.json"), "redirect"),
    "a redirect to a file": (status("302 Found", "Location: file:///etc/passwd"), "protocol"),
    "a redirect to nowhere": (status("302 Found", "Location: http://127.0.0.1:9/x"), "does not give it"),
    "a redirect without a place": (status("302 Found"), "status 302"),
    "a redirect to nonsense": (status("302 Found", "Location: http://[::1:x/"), "does not give it"),
    "compressed": (status("200 OK", "Content-Encoding: gzip", body=_BOMB), "Content-Encoding 'gzip'"),
    "compressed twice": (status("200 OK", "Content-Encoding: gzip, br", body=_BOMB), "Content-Encoding 'gzip, br'"),
    "a part from elsewhere": (ranged("bytes 5-9/10", slice(5)), "Content-Range 'bytes 5-9/10'"),
    "a part of nonsense": (ranged("bytes */10"), "Content-Range 'bytes */10'"),
    "a part of a huge number": (ranged("bytes 0-9/" + "9" * 6000), "Content-Range 'bytes 0-9/9"),
    "half": (lambda content, start, stop: [answer("200 OK", content[:9], length=len(content))], "ended after 9 bytes"),
    "a broken chunk": (lambda *_: [_CHUNKED + b"5\r\n{\"a\":\r\n"], "ended after 5 bytes, and then nothing"),
    "no HTTP": (lambda *_: [b"SSH-2.0-OpenSSH_9.6\r\n"], "does not give it"),
    "a closed connection": (lambda *_: [], "does not give it"),
    "silence": (silent, "config.json"),
    "a head in drops": (dripping_head, "comes too slowly"),
    "a body in drops": (endless(_HEAD, b" ", 0.1), "comes too slowly"),
    "a body without an end": (endless(_HEAD, b" " * (1 << 20)), "more than 64 MiB"),
    "a chunk without an end": (endless(_CHUNKED + b"ffffffff\r\n", b" " * (1 << 20)), "more than 64 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_CONFIG, indirect=True)
def test_a_lie_about_a_small_file_is_one_line(lying: Callable[..., Liar], name: str) -> None:
    lie, said = OF_CONFIG[name]
    liar = lying(lie, CONFIG)
    line = refusal("inspect", "owner/name")
    assert said in line and "owner/name" in line
    assert liar.sent < 200 << 20


def longer(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
    yield answer("206 Partial Content", content + bytes(1 << 20), f"Content-Range: bytes 0-{len(content) - 1}/100")


#: What is said of a shard.
OF_SHARD: dict[str, tuple[Lie, str]] = {
    "a page": (status("200 OK", body=b"<!DOCTYPE html><html>" * 20), SHARD),
    "404": (status("404 Not Found"), "which its index names"),
    "416": (status("416 Range Not Satisfiable", "Content-Range: bytes */0"), "status 416"),
    "more than there is": (longer, "Content-Range"),
    "a part from elsewhere": (ranged("bytes 100-199/5000", slice(100, 200)), "Content-Range 'bytes 100-199/5000'"),
    "a size that grows": (other_size_each_time, "the server contradicts itself"),
    "no size": (ranged("bytes 0-9/*", slice(10)), "does not say how large"),
    "no size, no end": (endless(_HEAD, bytes(1 << 20)), "does not say how large"),
    "a size beyond any disk": (ranged(f"bytes 0-99/{10**18 - 1}", slice(100)), SHARD),
    "zeros": (lambda c, start, stop: [answer("206 Partial Content", bytes(9), "Content-Range: bytes 0-8/9")], SHARD),
    "a part in drops": (dripping_part, "comes too slowly"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_SHARD, indirect=True)
def test_a_lie_about_a_shard_is_one_line(lying: Callable[..., Liar], name: str, tmp_path: Path) -> None:
    lie, said = OF_SHARD[name]
    liar = lying(lie, SHARD)
    line = refusal("export", "owner/name", str(tmp_path / "out"))
    assert said in line and "owner/name" in line
    assert liar.sent < 100 << 20 and not (tmp_path / "out").exists()


def test_a_session_that_another_thread_closes_is_no_contradiction(
    lying: Callable[..., Liar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def closing(content: bytes, start: int, stop: int | None) -> Iterator[bytes]:
        for number, piece in enumerate(dripping_part(content, start, stop)):
            yield piece
            if start == 0 and number == 2:
                huggingface_hub.close_session()

    monkeypatch.setattr(hub_files, "_PATIENCE_S", 2.0)
    liar = lying(closing, SHARD)
    assert f"{SHARD} comes too slowly" in refusal("export", "owner/name", str(tmp_path / "out"))
    asked = [re.search(r"(?im)^range: bytes=(\d+)-", head) for head in liar.heads if SHARD in head]
    assert len(asked) > 1 and asked[-1] is not None and int(asked[-1][1]) > 0, "the rest was asked for"


def everything_whole(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
    yield answer("200 OK", content)


def a_little_at_a_time(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
    end = min(start + 5000, len(content) if stop is None else stop, len(content))
    said = f"Content-Range: bytes {start}-{end - 1}/{len(content)}"
    yield answer("206 Partial Content", content[start:end], said)


@pytest.mark.parametrize(
    ("about", "lie"),
    [
        ((CONFIG, SHARD), everything_whole),
        ((CONFIG, SHARD), a_little_at_a_time),
        (("api",), status("200 OK", body=b"<html>")),
        (("api",), status("200 OK", body=b'{"siblings": [{"rfilename": 7}]}')),
        (("api",), status("429 Too Many", "Retry-After: 999999")),
        (("api",), endless(_HEAD, b" " * (1 << 20))),
    ],
    ids=["200 for 206", "short parts", "a page for a list", "an odd list", "too many lists", "a list without an end"],
)
def test_what_can_be_made_good_is(
    about: tuple[str, ...], lie: Lie, lying: Callable[..., Liar], tiny_source: Checkpoint
) -> None:
    lying(lie, *about)
    with headers("owner/name") as folder, Checkpoint.open(folder) as checkpoint:
        assert checkpoint.index_digest() == tiny_source.index_digest()


def test_a_name_in_a_list_leads_nowhere_else(lying: Callable[..., Liar], served: Path, tmp_path: Path) -> None:
    (served / INDEX).unlink()
    body = b'{"siblings": [{"rfilename": "../../x.safetensors"}, {"rfilename": "/etc/y.safetensors"}]}'
    lying(status("200 OK", body=body), "api")
    assert "owner/name" in refusal("inspect", "owner/name")
    assert not list(tmp_path.rglob("x.safetensors"))


def test_a_redirect_elsewhere_takes_no_token_along(
    lying: Callable[..., Liar], served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_lies(served, honest, ()) as other:
        place = f"Location: {other.url}/owner/name/resolve/main/{CONFIG}"
        liar = lying(status("302 Found", place), CONFIG)
        with headers("owner/name", config_only=True) as folder:
            assert (folder / CONFIG).read_bytes() == (served / CONFIG).read_bytes()
    assert "hf_secret" in liar.heads[0] and other.heads and "hf_secret" not in other.heads[0]


def test_an_index_of_many_shards_or_of_huge_headers_has_a_bound(
    lying: Callable[..., Liar], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ", ".join(f'"t{n}": "s{n}.safetensors"' for n in range(10_001))
    body = f'{{"metadata": {{}}, "weight_map": {{{names}}}}}'.encode()
    lying(status("200 OK", body=body), INDEX)
    assert "10,001 shards, expected at most 10,000" in refusal("inspect", "owner/name")
    monkeypatch.setattr(hub_files, "_MAX_BYTES", 100_000)
    lying(honest)
    assert "which those of no model have" in refusal("inspect", "owner/name")


def test_what_is_not_needed_any_more_is_left_alone(
    lying: Callable[..., Liar], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As Ctrl-C does: nothing is waited for in the threads that read."""
    monkeypatch.setattr(hub_files, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(hub_files, "_TIMEOUT_S", 60.0)
    lying(silent, CONFIG)
    import huggingface_hub

    files = Files(huggingface_hub, Repo("owner/name"))
    threading.Timer(0.3, files.stop).start()
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="not needed any more"):
        files.fetch(CONFIG, tmp_path / CONFIG)
    assert time.monotonic() - began < 5


def test_what_ends_as_a_wait_does_is_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Late(Future[bytes]):
        """Its first wait ends without a result just before there is one."""

        waits = 0

        def result(self, timeout: float | None = None) -> bytes:
            self.waits += 1
            if self.waits == 1:
                super().result()
                raise TimeoutError
            return super().result(timeout)

    monkeypatch.setattr(hub_files, "Future", Late)
    files = Files(huggingface_hub, Repo("owner/name"))
    assert files._in_time("a file", bytearray(), lambda: b"all of it") == b"all of it"


def test_a_file_that_another_ends_is_said_to_be_ended_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards that are read together the first to be waited for is not the one that is too slow."""
    import huggingface_hub

    monkeypatch.setattr(hub_files, "_PATIENCE_S", 0.3)
    files, end = Files(huggingface_hub, Repo("owner/name")), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        reads = [
            pool.submit(files._in_time, name, bytearray(size), end.wait)
            for name, size in (("one", 1 << 20), ("two", 0))
        ]
        lines = [str(read.exception(timeout=20)) for read in reads]
    end.set()
    assert lines == [lines[0]] * 2 and "two comes too slowly (0 bytes" in lines[0]
