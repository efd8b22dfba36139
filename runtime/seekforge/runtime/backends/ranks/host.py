"""The processes of an engine's ranks, as rank 0 sees them: they are started or awaited, watched, and ended.

Each has a socket to rank 0, over which it gets the shared memory and says that it is ready or what went wrong. A socket
closes when a process ends, however it ends, on both sides: a rank that loses rank 0 ends itself (`worker`), and rank 0
ends all others when one is lost. A rank whose process stands still no longer beats (`Memory.beat`).

Processes are started here, or by somebody else with the variables that torchrun sets: RANK, WORLD_SIZE and MASTER_PORT.
Then they meet at a socket that has a name but no file on Linux, and elsewhere one among the temporary files. Such a
name is anybody's: both ends look whose process the other is before they say anything, as the memory is the model's.
Ranks on several machines meet over TCP (`nodes`), and beat by empty lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import EngineError
from seekforge.common.paths import real_path
from seekforge.common.system import child_environment
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks.nodes import Meeting, gather, link, listening, meeting_of
from seekforge.runtime.backends.ranks.shared_memory import Memory

#: Seconds between looks at all ranks, and looks without a beat after which one counts as hanging.
_LOOK_S: Final = 0.1
_SILENT_LOOKS: Final = 50
#: Seconds that ranks started by somebody else may come later than rank 0, and that all have to end.
_MEETING_S, _ENDING_S = 120.0, 5.0
#: Bytes of a line over a socket.
_MOST_LINE = 1 << 16
_WORKER = "seekforge.runtime.backends.ranks.worker"


@dataclass(frozen=True)
class Launched:
    """What a launcher says of the process that it started.

    Attributes:
        rank: its rank.
        num_ranks: the number of all.
        meeting: the name of the socket where they meet.
        across: where they meet if they are on several machines; None: all are on this one.
    """

    rank: int
    num_ranks: int
    meeting: str
    across: Meeting | None = None


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """Return what a launcher such as torchrun says; None: this process starts the other ranks itself.

    Raises:
        EngineError: the variables cannot be.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        port = int(environment.get("MASTER_PORT", "29500"))
    except ValueError:
        rank, size, port = -1, 0, 0
    if not 0 <= rank < size:
        raise EngineError(
            f"RANK is {environment['RANK']!r:.50} and WORLD_SIZE {environment['WORLD_SIZE']!r:.50}, expected a rank "
            "from 0 to WORLD_SIZE - 1, and a number as MASTER_PORT; start all ranks with torchrun, or unset them"
        )
    if size == 1:
        return None
    if environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]) != environment["WORLD_SIZE"]:
        return Launched(rank, size, "", meeting_of(environment, port))
    name = f"seekforge-{os.getuid()}-{port}"
    return Launched(rank, size, f"\0{name}" if sys.platform == "linux" else str(Path(tempfile.gettempdir(), name)))


class _Process:
    """One rank other than 0."""

    def __init__(self, rank: int, connection: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        self.rank, self.connection, self.process = rank, connection, process
        self.ready: dict[str, Any] | None = None
        self.beats, self.silent = -1, 0
        self.heard = 0
        self.received = b""
        self.has_left = False

    def tell(self, first: Mapping[str, Any], memory: Memory | None) -> None:
        """Send what the rank shall do, with the memory, where it shares one. Of one that ended the watch tells."""
        line = json.dumps({**first, "rank": self.rank}).encode() + b"\n"
        with contextlib.suppress(OSError):
            if memory is None:
                self.connection.sendall(line)
            else:
                socket.send_fds(self.connection, [line], [memory.fd])


class Host:
    """All ranks but 0, whose process this is.

    Attributes:
        fault: why the ranks ended; None: they live.
        links: rank -> connection of rank 0 to it, where ranks are on several machines.
    """

    def __init__(
        self,
        folder: Path,
        memory: Memory | None,
        *,
        parallelism: Parallelism,
        digest: str,
        settings: Mapping[str, Any],
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        """Start or await the other ranks, tell them what to open, and watch them.

        Args:
            folder: the engine folder.
            memory: what they will share; None: they are on several machines.
            parallelism: how many there are.
            digest: the digest of the manifest that rank 0 read.
            settings: what else they have to know (`opening.settings_of`).
            on_fault: called once, from any thread, when the ranks are about to end for a fault.

        Raises:
            EngineError: a rank did not come.
        """
        self.fault: str | None = None
        self._on_fault = on_fault
        self._memory, self._closing, self._may_leave = memory, False, False
        self._changed = threading.Condition()
        self._processes: list[_Process] = []
        self.links: dict[int, socket.socket] = {}
        count = parallelism.num_ranks
        meeting = launched()
        first = {"folder": str(real_path(folder)), "digest": digest, "settings": settings}
        try:
            if meeting is not None and meeting.num_ranks != count:
                raise EngineError(
                    f"WORLD_SIZE is {meeting.num_ranks}, {folder} is an engine of {count} ranks; start {count}"
                )
            if meeting is not None and meeting.across is not None:
                self._meet_across(meeting.across, parallelism, first)
            else:
                if meeting is None:
                    for rank in range(1, count):
                        self._processes.append(_start(rank))
                else:
                    _await(meeting, self._processes)
                for process in self._processes:
                    process.tell(first, memory)
        except BaseException:
            self._end()
            raise
        self._watch = threading.Thread(target=self._look, name="seekforge-ranks", daemon=True)
        self._watch.start()

    def _meet_across(self, meeting: Meeting, parallelism: Parallelism, first: Mapping[str, Any]) -> None:
        """Await the ranks of all machines, tell them what to open and where the others are, and connect with them."""
        with listening(meeting.port) as server:
            arrivals = gather(meeting, parallelism.num_ranks, server)
            addresses = {one.rank: one.address for one in arrivals} | {0: (meeting.address, meeting.port)}
            for one in arrivals:
                self._processes.append(_Process(one.rank, one.connection, None))
                self._processes[-1].tell({**first, "addresses": addresses}, None)
            self.links = link(parallelism, 0, addresses, server, meeting.secret)

    def check(self) -> None:
        """Raise when a rank is lost.

        Raises:
            EngineError: naming it.
        """
        if self.fault is not None:
            raise EngineError(self.fault)

    def ended(self) -> str | None:
        """Return why all other ranks were ended, when they have; None: they live."""
        with self._changed:
            return self.fault

    def await_ready(self) -> None:
        """Wait until every rank has opened its part.

        Raises:
            EngineError: one could not, or was lost.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.fault or all(one.ready is not None for one in self._processes))
        self.check()

    def fail(self, fault: str) -> None:
        """End all ranks, for a reason that every later call gives."""
        with self._changed:
            is_first = self.fault is None and not self._closing
            if is_first:
                self.fault = fault
            self._end()
            self._changed.notify_all()
        if is_first:
            self._on_fault()

    def let_leave(self) -> None:
        """Take it from now on that ranks end by themselves, which they are about to be told; one that is killed or
        stands still is lost as before."""
        self._may_leave = True

    def close(self) -> None:
        """End the ranks, which were told to: those that do not within seconds are killed."""
        self._closing = True
        self._watch.join()
        deadline = time.monotonic() + _ENDING_S
        for one in self._processes:
            left = max(deadline - time.monotonic(), 0.01)
            if one.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(left)
            elif self.fault is None:
                one.connection.settimeout(left)
                with contextlib.suppress(OSError):
                    while one.connection.recv(_MOST_LINE):
                        pass
        self._end()
        for one in self._processes:
            one.connection.close()

    def _end(self) -> None:
        for one in self._processes:
            if one.process is not None and one.process.poll() is None:
                one.process.kill()
                one.process.wait()
            with contextlib.suppress(OSError):
                one.connection.shutdown(socket.SHUT_RDWR)  # a rank of somebody else ends with it

    def _look(self) -> None:
        """Look at all ranks until they end."""
        with selectors.DefaultSelector() as selector:
            for one in self._processes:
                selector.register(one.connection, selectors.EVENT_READ, one)
            while not self._closing and self.fault is None:
                for key, _ in selector.select(_LOOK_S):
                    fault = self._read(key.data)
                    if key.data.has_left:
                        selector.unregister(key.fileobj)
                    elif fault is not None:
                        self.fail(fault)
                        return
                silent = self._silent()
                if silent is not None:
                    self.fail(f"rank {silent.rank}{_pid(silent)} stands still; start the engine again")

    def _read(self, one: _Process) -> str | None:
        """Take what a rank says; return why it is lost, if it is."""
        try:
            data = one.connection.recv(_MOST_LINE)
        except OSError:
            data = b""
        if not data:
            said = _ending(one)
            one.has_left = self._may_leave and (one.process is None or one.process.poll() == 0)
            return f"rank {one.rank}{_pid(one)} {said}; start the engine again"
        one.received = (one.received + data)[-_MOST_LINE:]
        while b"\n" in one.received:
            line, _, one.received = one.received.partition(b"\n")
            if not line:  # a beat
                one.heard += 1
                continue
            said = json.loads(line)
            if "error" in said:
                return f"rank {one.rank}: {said['error']}"
            with self._changed:
                one.ready = said
                self._changed.notify_all()
        return None

    def _silent(self) -> _Process | None:
        """Return a rank that has not said for long that it lives. Looks are counted, not seconds: where this process
        stood still itself, nobody is to blame."""
        for one in self._processes:
            if one.has_left:
                continue
            beats = one.heard if self._memory is None else self._memory.beats(one.rank)
            one.silent = one.silent + 1 if beats == one.beats and one.ready is not None else 0
            one.beats = beats
            if one.silent > _SILENT_LOOKS:
                return one
        return None


def _pid(one: _Process) -> str:
    return "" if one.process is None else f" (process {one.process.pid})"


def _ending(one: _Process) -> str:
    """Say how a process ended."""
    if one.process is None:
        return "ended"
    try:
        code = one.process.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _start(rank: int) -> _Process:
    """Start the process of a rank, outside of this one's group: an interrupt at the terminal is for rank 0."""
    here, there = socket.socketpair()
    with there:
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, str(there.fileno())],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=child_environment() | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    return _Process(rank, here, process)


def _await(meeting: Launched, processes: list[_Process]) -> None:
    """Wait for the ranks that somebody else starts."""
    with _listening(meeting) as server:
        deadline = time.monotonic() + _MEETING_S
        while len(processes) < meeting.num_ranks - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = set(range(1, meeting.num_ranks)) - {one.rank for one in processes}
                raise EngineError(
                    f"rank {min(missing)} did not come within {_MEETING_S:.0f} s; start all {meeting.num_ranks} ranks"
                ) from None
            said = _greeting(connection)
            if said is None:  # a stranger
                connection.close()
                continue
            if not 1 <= said < meeting.num_ranks or said in {one.rank for one in processes}:
                raise EngineError(f"rank {said} came twice or is none of {meeting.num_ranks}; give each its own RANK")
            processes.append(_Process(said, connection, None))
    processes.sort(key=lambda one: one.rank)


@contextlib.contextmanager
def _listening(meeting: Launched) -> Iterator[socket.socket]:
    """Give the socket at which ranks meet, and take its file away, where it has one, when all have come."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            _forget_dead(meeting.meeting)
            server.bind(meeting.meeting)
        except OSError:
            name = meeting.meeting.removeprefix("\0")
            raise EngineError(f"another engine's ranks meet at {name}; set MASTER_PORT to another number") from None
        server.listen(meeting.num_ranks)
        try:
            yield server
        finally:
            if not meeting.meeting.startswith("\0"):
                Path(meeting.meeting).unlink(missing_ok=True)


def _forget_dead(place: str) -> None:
    """Remove the file of a socket of ours that nobody listens at: its process was killed."""
    if place.startswith("\0") or not Path(place).exists() or Path(place).stat().st_uid != os.getuid():
        return
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.connect(place)
        except ConnectionRefusedError:
            Path(place).unlink()


def _greeting(connection: socket.socket) -> int | None:
    """Return the rank that a new connection names; None: it is not one of this user's, or none at all."""
    if not _is_ours(connection):
        return None
    connection.settimeout(_ENDING_S)
    try:
        said = connection.recv(_MOST_LINE)
    except OSError:
        return None
    connection.settimeout(None)
    return int(said) if said.isdigit() and len(said) < 10 else None


def _is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user."""
    if not hasattr(socket, "SO_PEERCRED"):  # a file then, which says whose it is
        place = connection.getpeername() or connection.getsockname()
        return Path(place).stat().st_uid == os.getuid()
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return user == os.getuid()


def meet(meeting: Launched) -> socket.socket:
    """Return the connection of a rank that was started by somebody else to rank 0.

    Raises:
        EngineError: rank 0 did not come.
    """
    deadline = time.monotonic() + _MEETING_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(meeting.meeting)
            if not _is_ours(connection):
                raise PermissionError(f"{meeting.meeting} is another user's")
            connection.sendall(str(meeting.rank).encode())
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise EngineError(f"rank 0 did not come within {_MEETING_S:.0f} s; start it too") from None
            time.sleep(_LOOK_S)
