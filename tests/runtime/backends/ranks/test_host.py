"""Ranks that somebody else started meet, whoever else comes to the meeting."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seekforge.common.errors import EngineError
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks import backend as ranks_backend
from seekforge.runtime.backends.ranks import host
from seekforge.runtime.backends.ranks.backend import RanksBackend
from seekforge.runtime.backends.ranks.host import Host, Launched, launched, meet
from seekforge.runtime.backends.ranks.shared_memory import Memory
from seekforge.runtime.backends.tensorrt.waiting import SilentGpuError

VARIABLES = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": f"{os.getpid()}"}


@pytest.mark.parametrize(
    "odd",
    [
        {"RANK": "-1"},
        {"RANK": "2"},
        {"RANK": ""},
        {"RANK": "x\n\x1b[31m"},
        {"RANK": "9" * 5000},
        {"WORLD_SIZE": "1e3"},
        {"WORLD_SIZE": "0"},
        {"MASTER_PORT": "http"},
        {"LOCAL_WORLD_SIZE": "1"},
    ],
)
def test_odd_variables_are_one_line(odd: dict[str, str]) -> None:
    with pytest.raises(EngineError) as error:
        launched(VARIABLES | odd)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.fixture(params=["linux", "darwin"])
def meeting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launched:
    """A meeting of two ranks, as Linux has it and as macOS does."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(host, "_ENDING_S", 0.3)
    if request.param != "linux":
        monkeypatch.setattr(sys, "platform", request.param)
        monkeypatch.delattr(socket, "SO_PEERCRED", raising=False)
    found = launched(VARIABLES)
    assert found is not None
    return found


def gathered(meeting: Launched, *visits: Callable[[socket.socket], object]) -> list[int]:
    """Hold a meeting to which others come before its rank 1; returns the ranks that were let in."""
    processes: list[host._Process] = []
    holding = threading.Thread(target=host._await, args=(meeting, processes))
    holding.start()
    kept = []
    for visit in visits:
        while True:
            stranger = socket.socket(socket.AF_UNIX)
            try:
                stranger.connect(meeting.meeting)
                break
            except OSError:  # it has not begun
                stranger.close()
        kept.append(stranger)
        visit(stranger)
    with meet(Launched(1, 2, meeting.meeting)):
        holding.join(30)
    for one in (*kept, *(process.connection for process in processes)):
        one.close()
    return [process.rank for process in processes]


def test_strangers_at_the_meeting_are_sent_away(meeting: Launched, tmp_path: Path) -> None:
    visits = (
        lambda one: one.sendall(b"GET / HTTP/1.1\r\n\r\n"),
        lambda one: one.sendall(b"9" * 60_000),
        lambda one: one.close(),
        lambda one: None,
        lambda one: one.sendall("²".encode()),
    )
    assert gathered(meeting, *visits) == [1]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="the system tells no owner of a connection")
def test_a_process_of_another_user_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the memory, as it would of rank 0, nor a rank that opens what it says."""
    real = socket.socket.getsockopt
    foreign = struct.pack("3i", 1, os.getuid() + 1, 0)

    def owner(self: socket.socket, level: int, option: int, size: int = 0) -> object:
        return foreign if size == len(foreign) else real(self, level, option, size)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"1")
        assert host._greeting(ours) == 1
        theirs.sendall(b"1")
        monkeypatch.setattr(host, "_is_ours", lambda connection: False)
        assert host._greeting(ours) is None
    monkeypatch.undo()
    monkeypatch.setattr(socket.socket, "getsockopt", owner)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not host._is_ours(ours)


def test_the_file_of_a_killed_meeting_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "meeting"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    assert place.exists()
    assert gathered(Launched(0, 2, str(place))) == [1]
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(place))
        alive.listen()
        with pytest.raises(EngineError, match=r"another engine's ranks meet at .*/meeting; set MASTER_PORT"):
            host._await(Launched(0, 2, str(place)), [])


@pytest.mark.parametrize(("may_leave", "code", "is_lost"), [(True, 0, False), (True, -9, True), (False, 0, True)])
def test_a_rank_that_was_told_to_end_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, may_leave: bool, code: int, is_lost: bool
) -> None:
    """Rank 0 may still be giving back its own things then, and nothing of them is to be aborted."""
    theirs: list[socket.socket] = []

    def start(rank: int) -> Any:
        ours, there = socket.socketpair()
        theirs.append(there)
        process: Any = SimpleNamespace(pid=1, wait=lambda timeout=None: code, poll=lambda: code)
        return host._Process(rank, ours, process)

    monkeypatch.setattr(host, "_start", start)
    aborted: list[bool] = []
    memory = Memory(Parallelism(tp=2))
    watched = Host(
        tmp_path, memory, parallelism=Parallelism(tp=2), digest="", settings={}, on_fault=lambda: aborted.append(True)
    )
    if may_leave:
        watched.let_leave()
    theirs[0].close()
    deadline = time.monotonic() + 10
    while not watched._processes[0].has_left and not aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watched._processes[0].has_left is not is_lost
    watched.close()
    memory.close()
    assert (watched.fault is not None, aborted) == (is_lost, [True] if is_lost else [])


def test_what_is_wrong_with_an_abort_is_not_said_in_place_of_the_rank_that_is_lost() -> None:
    def abort() -> None:
        raise EngineError("NCCL: unhandled system error")

    backend = RanksBackend.__new__(RanksBackend)
    backend._rank = SimpleNamespace(abort=abort)  # pyright: ignore[reportAttributeAccessIssue]
    backend._abort()


@pytest.mark.parametrize("told", [None, "rank 1: its GPU stands still"])
def test_a_step_that_a_silent_gpu_ends_names_the_rank(told: str | None) -> None:
    """Rank 0 itself, if nobody has said before that it is to blame."""
    said: list[str] = []
    backend = RanksBackend.__new__(RanksBackend)
    backend._host = SimpleNamespace(fault=told, fail=said.append)  # pyright: ignore[reportAttributeAccessIssue]
    expected = told or "rank 0: its GPU stands still"

    def work() -> None:
        raise SilentGpuError("its GPU stands still")

    with pytest.raises(EngineError, match=f"^{expected}$"):
        backend._together(work)
    assert said == [expected]


@pytest.mark.parametrize("comes", [True, False])
def test_an_engine_that_is_not_opened_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, comes: bool
) -> None:
    """Neither what rank 0 has on its device, nor the memory; whether the others came or not."""
    closed: list[str] = []
    memories: list[Memory] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        raise EngineError("rank 1: there is no GPU")

    def made(parallelism: Parallelism) -> Memory:
        memories.append(Memory(parallelism))
        return memories[-1]

    watched = SimpleNamespace(check=lambda: None, await_ready=refuse, fail=closed.append)
    monkeypatch.setattr(ranks_backend, "Memory", made)
    monkeypatch.setattr(ranks_backend, "Host", (lambda *arguments, **options: watched) if comes else refuse)
    rank = SimpleNamespace(close=lambda: closed.append("rank 0"))
    monkeypatch.setattr(ranks_backend, "open_rank", lambda *arguments: rank)
    manifest: Any = SimpleNamespace(
        ranks=SimpleNamespace(parallelism=Parallelism(tp=2)), target=SimpleNamespace(backend="onnxruntime"), digest=""
    )
    with pytest.raises(EngineError, match="there is no GPU"):
        RanksBackend(tmp_path, manifest)
    assert closed == (["the engine was not opened", "rank 0"] if comes else [])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memories[0].fd)
