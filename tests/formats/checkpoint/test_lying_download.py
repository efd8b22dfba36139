"""A server that lies while weights are downloaded: one line, in bounded time and bytes, and another try mends it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from tests.support.hub_server import Hub, serve
from tests.support.lying_server import Lie, answer, honest

from seekforge.common.errors import CheckpointError
from seekforge.formats.checkpoint import hub as hub_module
from seekforge.formats.checkpoint.hub import resolve
from seekforge.formats.checkpoint.hub_answers import checked_answers
from seekforge.formats.checkpoint.hub_files import Repo
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.formats.checkpoint.shard_writer import write_shard

constants = pytest.importorskip("huggingface_hub.constants", reason="the hub extra is not installed")
import numpy as np  # noqa: E402

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_SIZE = 400_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Two shards of 400 kB; what is waited for is short."""
    folder = tmp_path / "served"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, tensor in ((FIRST, "a"), (SECOND, "b")):
        write_shard(folder / name, {tensor: rng.random(_SIZE // 4, np.float32)})
    index = {"metadata": {"total_size": 2 * _SIZE}, "weight_map": {"a": FIRST, "b": SECOND}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what came of a part is gone on from
    monkeypatch.setattr(hub_module, "_BESIDE_WEIGHTS_BYTES", 1 << 20)
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))
    with serve(folder) as one:
        monkeypatch.setenv("HF_ENDPOINT", one.url)
        yield one


def outside(root: Path) -> list[str]:
    """Return the files that are neither served nor in the cache."""
    inside = (root / "served", root / "cache")
    return [str(p) for p in root.rglob("*") if p.is_file() and not any(p.is_relative_to(folder) for folder in inside)]


def body(change: slice, *, add: bytes = b"") -> Lie:
    return lambda content, start, stop: [answer("200 OK", content[change] + add)]


def half_and_then(rest: Lie) -> Lie:
    """The first answer breaks off in the middle; what comes when the rest is asked for is another's."""

    def lie(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
        if start:
            return rest(content, start, stop)
        return [answer("200 OK", content[: len(content) // 2], length=len(content))]

    return lie


def endless(head: bytes) -> Lie:
    def lie(content: bytes, start: int, stop: int | None) -> Iterator[bytes]:
        yield head
        yield from itertools.repeat(bytes(1 << 16))

    return lie


def from_elsewhere(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
    said = f"Content-Range: bytes {start}-{len(content) - 1}/{len(content)}"
    return [answer("206 Partial Content", content[: len(content) - start], said)]


def short_part(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
    said = f"Content-Range: bytes {start}-{len(content) - 2}/{len(content)}"
    return [answer("206 Partial Content", content[start:-1], said)]


def silent(content: bytes, start: int, stop: int | None) -> Iterable[bytes]:
    threading.Event().wait(20)
    return []


LIES: dict[str, Lie] = {
    "less than it has": body(slice(-100)),
    "nothing": body(slice(0)),
    "more than it has": body(slice(None), add=bytes(1000)),
    "zeros": lambda content, start, stop: [answer("200 OK", bytes(len(content)))],
    "a page": lambda content, start, stop: [answer("200 OK", b"<html>Log in</html>")],
    "no end": endless(b"HTTP/1.1 200 OK\r\n\r\n"),
    "no end, by its size": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999\r\n\r\n"),
    "chunks without an end": endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n"),
    "a bomb": lambda *_: [answer("200 OK", gzip.compress(bytes(8 << 20)), "Content-Encoding: gzip")],
    "half, then from elsewhere": half_and_then(from_elsewhere),
    "half, then a short part": half_and_then(short_part),
    "half, then 416": half_and_then(lambda *_: [answer("416 Range Not Satisfiable")]),
    "half, then 404": half_and_then(lambda *_: [answer("404 Not Found")]),
    "half, then silence": half_and_then(silent),
    "half, then nothing": half_and_then(lambda *_: []),
    "half, again and again": half_and_then(lambda content, start, stop: [answer("206 Part", b"", length=9)]),
    "no HTTP": lambda *_: [b"SSH-2.0-OpenSSH_9.6\r\n"],
}


def refused(hub: Hub, tmp_path: Path) -> str:
    """Download what must be refused in one line, soon; return the line."""
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="owner/name") as found:
        resolve("owner/name", quiet=True)
    line = str(found.value)
    assert "\n" not in line and len(line) < 1000
    assert time.monotonic() - began < 60 and hub.sent < 64 << 20
    assert outside(tmp_path) == []
    return line


@pytest.mark.parametrize("name", LIES)
def test_a_lie_about_a_shard_is_one_line_and_the_next_try_makes_it_good(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.lies[SECOND] = LIES[name]
    refused(hub, tmp_path)
    hub.lies.clear()
    folder = resolve("owner/name", quiet=True)
    for shard in (FIRST, SECOND):
        assert (folder / shard).read_bytes() == (hub.folder / shard).read_bytes()


def test_half_and_then_the_rest_is_no_lie(hub: Hub) -> None:
    hub.lies[SECOND] = half_and_then(honest)
    assert (resolve("owner/name", quiet=True) / SECOND).read_bytes() == (hub.folder / SECOND).read_bytes()


def slowly(content: bytes, start: int, stop: int | None) -> Iterator[bytes]:
    yield answer("200 OK", b"", length=len(content))
    for begin in range(0, len(content), 1 << 13):
        threading.Event().wait(0.2)
        yield content[begin : begin + (1 << 13)]


def test_an_interrupt_waits_for_no_shard(hub: Hub) -> None:
    """The library's threads, eight of them with 4 GB each, end with the next piece that comes."""
    hub.lies[FIRST] = hub.lies[SECOND] = slowly  # ten seconds
    others = set(threading.enumerate())

    def threads() -> list[str]:
        found = [one.name for one in threading.enumerate() if one not in others]
        return [name for name in found if name.startswith("ThreadPoolExecutor")]

    def interrupt() -> None:
        while not threads():
            threading.Event().wait(0.01)
        threading.Event().wait(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            resolve("owner/name", quiet=True)
    finally:
        signal.signal(signal.SIGINT, before)
    began = time.monotonic()
    assert threads()
    while threads():
        threading.Event().wait(0.05)
    assert time.monotonic() - began < 5
    hub.lies.clear()
    folder = resolve("owner/name", quiet=True)
    assert [(folder / name).read_bytes() == (hub.folder / name).read_bytes() for name in (FIRST, SECOND)] == [True] * 2


def test_an_interrupt_waits_for_no_digest(tmp_path: Path) -> None:
    """Of what was downloaded; here of holes, which would take a minute."""
    for number in range(8):
        blob = tmp_path / "blobs" / f"{number:064x}"
        blob.parent.mkdir(exist_ok=True)
        with blob.open("wb") as file:
            file.truncate(16 << 30)
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / f"{number}.safetensors").symlink_to(blob)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            hub_module._check_blobs(tmp_path / "snapshot", Repo("owner/name", None))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5
    assert len(list((tmp_path / "blobs").iterdir())) == 8


def resolved_or_refused() -> Path | None:
    """Return the folder of the checkpoint; None where one short line refuses it, which names the repository."""
    try:
        return resolve("owner/name", quiet=True)
    except CheckpointError as error:
        assert "\n" not in str(error) and "owner/name" in str(error) and len(str(error)) < 1000
        return None


@pytest.mark.parametrize(
    "said",
    [
        {"X-Linked-Size": "7"},
        {"X-Linked-Size": "-1"},
        {"X-Linked-Size": str(10**15)},
        {"ETag": f'"{"a" * 64}"'},
        {"ETag": '"../../../evil"'},
        {"ETag": '"/tmp/evil"'},
        {"X-Repo-Commit": "../../evil"},
    ],
    ids=str,
)
def test_a_lie_about_size_or_digest_is_one_line(said: dict[str, str], hub: Hub, tmp_path: Path) -> None:
    hub.facts[SECOND] = said
    folder = resolved_or_refused()
    if folder is not None:  # what it said of was not believed
        assert (folder / SECOND).read_bytes() == (hub.folder / SECOND).read_bytes()
        assert "ETag" not in said or (folder / SECOND).resolve().is_relative_to(tmp_path / "cache")
    assert outside(tmp_path) == [] and not Path("/tmp/evil").exists()


def on_xet(**said: object) -> dict[str, object]:
    """What a list says of a large file on Xet: from this alone the library makes the names of its blob."""
    return {"lfs": {"oid": "a" * 64, "size": _SIZE, "pointerSize": 9}, "xetHash": "b" * 64} | said


@pytest.mark.parametrize(
    "said",
    [
        on_xet(lfs={"oid": "../../../evil", "size": 9, "pointerSize": 9}),
        on_xet(lfs={"oid": "/tmp/evil", "size": 9, "pointerSize": 9}),
        on_xet(lfs={"oid": "..", "size": 9, "pointerSize": 9}),
        on_xet(lfs={"oid": ["a"], "size": 9, "pointerSize": 9}),
        on_xet(oid="../../evil"),
        on_xet(xetHash="../evil"),
        {"path": "../../../evil.json"},
        {"path": "/tmp/evil.json"},
        {"path": 7},
        {"path": "a\0b.json"},
        {"size": "many"},
        {"type": "directory"},
        {"lfs": 7},
    ],
    ids=str,
)
def test_a_lie_in_the_list_of_files_is_one_line(said: dict[str, object], hub: Hub, tmp_path: Path) -> None:
    hub.listed[SECOND] = said
    folder = resolved_or_refused()
    if folder is not None:  # what it said of was not believed
        assert not (folder / SECOND).exists() or (folder / SECOND).resolve().is_relative_to(tmp_path / "cache")
    assert outside(tmp_path) == [] and not list(Path("/tmp").glob("evil*"))


@pytest.mark.parametrize("commit", ["../../../../evil", "/tmp/evil", "..", "main", ""])
def test_a_commit_that_leads_elsewhere_is_one_line(commit: str, hub: Hub, tmp_path: Path) -> None:
    hub.commit = commit
    assert "sha in the server's list of files" in refused(hub, tmp_path)


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (endless(b"HTTP/1.1 200 OK\r\n\r\n["), "says more than 64 MiB"),
        (endless(b"HTTP/1.1 500 Oh\r\n\r\n"), "says more than 64 MiB"),
        (lambda *_: [answer("200 OK", gzip.compress(bytes(8 << 20)), "Content-Encoding: gzip")], "Content-Encoding"),
        (lambda *_: [answer("200 OK", b"<html>Log in</html>")], "no JSON"),
        (lambda *_: [answer("200 OK", b"[" * 100_000)], "no JSON"),
    ],
)
def test_a_list_of_files_is_bounded(lie: Lie, said: str, hub: Hub, tmp_path: Path) -> None:
    hub.lies["list"] = lie
    with pytest.raises(CheckpointError, match="owner/name") as found:
        resolve("owner/name", quiet=True)
    assert said in str(found.value) and "\n" not in str(found.value)
    assert hub.sent < 80 << 20 and outside(tmp_path) == []


@pytest.mark.parametrize("status", ["302 Found", "200 OK"])
def test_a_list_from_an_address_of_a_file_is_looked_at_too(status: str, hub: Hub, tmp_path: Path) -> None:
    """A server chooses where a list is moved to, and where the next one is."""
    evil = {"path": "x.json", "type": "file", "size": 1, "oid": "0" * 40} | on_xet(lfs={"oid": "../../evil", "size": 1})
    (hub.folder / "list.json").write_text(json.dumps([evil]))
    address = f"{hub.url}/owner/name/resolve/main/list.json"
    said = f"Location: {address}" if status.startswith("302") else f'Link: <{address}>; rel="next"'
    hub.lies["list"] = lambda *_: [answer(status, b"[]", said, "Content-Type: application/json")]
    assert "oid in the server's list of files is '../../evil'" in refused(hub, tmp_path)


def test_lists_without_end_are_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.pages = 10**9
    assert "more than 100 lists" in refused(hub, tmp_path)


def test_a_server_that_says_to_wait_for_years_is_not_waited_for(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    hub.lies["list"] = lambda *_: [answer("429 Too Many Requests", b"", "Retry-After: 99999999")]
    assert "too many requests (status 429)" in refused(hub, tmp_path)
    assert sum(waited) < 120


def test_a_client_that_is_made_anew_is_watched_too(hub: Hub) -> None:
    """The library closes its client and makes another when a connection fails."""
    library = hub_module._library("owner/name")
    hub.facts[SECOND] = {"ETag": '"../../evil"'}
    address = f"{hub.url}/owner/name/resolve/main/{SECOND}"
    with checked_answers(library, Repo("owner/name")) as answers:
        answers.begin_files()
        library.utils.close_session()
        with pytest.raises(CheckpointError, match="etag"):
            library.utils.get_session().get(address)
    assert library.utils.get_session().head(address).headers["etag"] == '"../../evil"'
