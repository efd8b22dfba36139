"""The process of a rank other than 0: it opens its part of an engine and does what rank 0 broadcasts."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import Manifest, load_manifest
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.step_io import StepInputs
from seekforge.runtime.backends.ranks.collectives import Collectives
from seekforge.runtime.backends.ranks.message import Message
from seekforge.runtime.backends.ranks.network import Network
from seekforge.runtime.backends.ranks.nodes import Meeting, come, link, listening
from seekforge.runtime.backends.ranks.opening import OpenRank, open_rank
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory

#: Seconds between two beats.
_BEAT_S = 0.1
#: What `StepInputs` consists of; a stage takes its intermediate tensors from the one before it.
_STEP_ARRAYS = tuple(one.name for one in fields(StepInputs) if one.name != "intermediate_tensors")


def work(connection: socket.socket) -> None:
    """Be a rank: return when rank 0 closes the engine. When rank 0 is lost the process ends.

    Raises:
        EngineError: this rank cannot go on; rank 0 was told.
    """
    text, descriptors = _first_line(connection)
    rank0 = _Rank0(connection)
    with rank0.told_of_errors():
        said = json.loads(text)
        manifest = _manifest(Path(said["folder"]), said)
        assert manifest.ranks is not None
        memory = Memory(manifest.ranks.parallelism, descriptors[0])
        rank0.beats(lambda: memory.beat(said["rank"]))
        # who waits in vain is ended by the beats
        _serve(rank0, manifest, said, SharedMemory(memory, said["rank"], lambda: None))


def work_across(meeting: Meeting, rank: int, folder: Path) -> None:
    """Be a rank of an engine on several machines; otherwise as `work`.

    Args:
        meeting: where the ranks meet.
        rank: which this is.
        folder: the engine's folder on this machine.

    Raises:
        EngineError: rank 0 did not come, or this rank cannot go on; rank 0 was told.
    """
    with listening() as server, come(meeting, rank, server) as connection:
        rank0 = _Rank0(connection)
        with rank0.told_of_errors():
            said = json.loads(_line(connection))
            manifest = _manifest(folder, said | {"folder": str(folder)})
            assert manifest.ranks is not None
            rank0.beats(lambda: rank0.say(b""))
            addresses = {int(other): (str(host), int(port)) for other, (host, port) in said["addresses"].items()}
            links = link(manifest.ranks.parallelism, rank, addresses, server, meeting.secret)
            _serve(rank0, manifest, said, Network(manifest.ranks.parallelism, rank, links, lambda: None))


def _first_line(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return what rank 0 says first, and the descriptor of the memory that comes with it."""
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    if text and not text.endswith(b"\n"):
        text += _line(connection)
    if not text or not descriptors:
        os._exit(1)  # rank 0 is gone
    return text, descriptors


def _line(connection: socket.socket) -> bytes:
    """Return what rank 0 says, to the end of the line, behind which it says nothing."""
    text = b""
    while not text.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            os._exit(1)  # rank 0 is gone
        text += more
    return text


def _manifest(folder: Path, said: Mapping[str, Any]) -> Manifest:
    manifest = load_manifest(folder)
    if manifest.digest != said["digest"] or manifest.ranks is None:
        raise EngineError(f"{folder} is not the engine that rank 0 opened; give all ranks the same folder")
    return manifest


def _serve(rank0: _Rank0, manifest: Manifest, said: Mapping[str, Any], collectives: Collectives) -> None:
    """Open this rank's part and do what rank 0 broadcasts."""
    assert manifest.ranks is not None
    number = said["rank"]
    rank = open_rank(Path(said["folder"]), manifest, number, collectives, said["settings"])
    rank0.say(json.dumps({"ready": number, "digest": manifest.digest}).encode())
    take_calls(rank, collectives, manifest.ranks.parallelism, number)
    rank.close()  # may take long, and wait for other ranks: it goes on saying that it lives
    rank0.leave()


class _Rank0:
    """The connection to rank 0: what this rank says, and that it lives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._saying = threading.Lock()
        self._closed = threading.Event()
        self._beat: threading.Thread | None = None

    def say(self, line: bytes) -> None:
        """Send a line; an empty one is a beat, for rank 0 on another machine."""
        with self._saying:
            self._connection.sendall(line + b"\n")

    @contextlib.contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """Tell rank 0 what is raised inside of the context."""
        try:
            yield
        except BaseException as error:
            words = " ".join(str(error).split()) or type(error).__name__
            told = words if isinstance(error, EngineError) else f"{type(error).__name__}: {words}"
            self.say(json.dumps({"error": told}).encode()[:60_000])
            raise

    def beats(self, beat: Callable[[], None]) -> None:
        """Beat from now on in a thread, which also ends this process when rank 0 is lost."""
        self._beat = threading.Thread(target=self._go_on, args=(beat,), name="seekforge-beat", daemon=True)
        self._beat.start()

    def leave(self) -> None:
        """Stop beating: rank 0 has closed the engine."""
        self._closed.set()
        if self._beat is not None:
            self._beat.join()

    def _go_on(self, beat: Callable[[], None]) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError):  # told below
                beat()
            readable, _, _ = select.select([self._connection], [], [], _BEAT_S)
            if readable and not self._is_there():
                time.sleep(_BEAT_S)  # the main thread may be about to end by itself
                if not self._closed.is_set():
                    os._exit(1)

    def _is_there(self) -> bool:
        try:
            return bool(self._connection.recv(1))
        except OSError:
            return False


def take_calls(rank: OpenRank, collectives: Collectives, parallelism: Parallelism, number: int) -> None:
    """Do what rank 0 broadcasts until it closes the engine.

    Args:
        rank: the opened rank.
        collectives: what it has of the others.
        parallelism: how many ranks there are.
        number: which of them it is.
    """
    place = parallelism.coordinates(number)
    while True:
        message = collectives.broadcast()
        call = message.values["call"]
        if call == "run":
            rank.run(step_of(message), message.values["outputs"], message.values["graph"], message.values["parts"])
        elif call == "allocate_caches":
            rank.allocate_caches(message.values["num_blocks"])
        elif call == "update_weights":
            rank.update_weights(message.arrays)
        elif call == "cache":
            value = rank.cache(message.values["name"])
            if place.tp_rank == 0 and place.pp_rank > 0:
                arrays = {} if value is None else {"cache": value}
                collectives.send(Message(arrays=arrays), source=number, target=0)
        else:
            assert call == "close", call
            return


def message_of(inputs: StepInputs, outputs: list[str], graph: str, parts: int) -> Message:
    """Return a step as what rank 0 broadcasts; `parts`: its micro-batches."""
    arrays = {name: value for name in _STEP_ARRAYS if (value := getattr(inputs, name)) is not None}
    return Message({"call": "run", "outputs": outputs, "graph": graph, "parts": parts}, arrays)


def step_of(message: Message) -> StepInputs:
    """Return the step that a message holds."""
    arrays: dict[str, Any] = {name: message.arrays[name] for name in _STEP_ARRAYS if name in message.arrays}
    return StepInputs(**arrays)


def main() -> None:
    """Run the rank whose socket the command line names."""
    descriptor = int(sys.argv[1])
    with socket.socket(fileno=descriptor) as connection:
        try:
            work(connection)
        except BaseException:  # rank 0 says it
            os._exit(1)
    os._exit(0)  # threads and sessions have nothing left to do


if __name__ == "__main__":
    main()
