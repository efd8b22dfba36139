"""The process of a rank other than 0: it opens its part of an engine and does what rank 0 broadcasts."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.step_io import StepInputs
from seekforge.runtime.backends.ranks.collectives import Collectives
from seekforge.runtime.backends.ranks.message import Message
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
    try:
        said = json.loads(text)
        _serve(connection, said, descriptors[0])
    except BaseException as error:
        words = " ".join(str(error).split()) or type(error).__name__
        line = json.dumps({"error": words if isinstance(error, EngineError) else f"{type(error).__name__}: {words}"})
        connection.sendall(line[:60_000].encode() + b"\n")
        raise


def _first_line(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return what rank 0 says first, and the descriptor of the memory that comes with it."""
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    while text and not text.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            break
        text += more
    if not text or not descriptors:
        os._exit(1)  # rank 0 is gone
    return text, descriptors


def _serve(connection: socket.socket, said: dict[str, Any], descriptor: int) -> None:
    folder, number = Path(said["folder"]), said["rank"]
    manifest = load_manifest(folder)
    if manifest.digest != said["digest"] or manifest.ranks is None:
        raise EngineError(f"{folder} is not the engine that rank 0 opened; give all ranks the same folder")
    memory = Memory(manifest.ranks.parallelism, descriptor)
    closed = threading.Event()
    beat = threading.Thread(target=_beat, args=(connection, memory, number, closed), name="seekforge-beat", daemon=True)
    beat.start()
    collectives = SharedMemory(memory, number, lambda: None)  # who waits in vain is ended by `_beat`
    rank = open_rank(folder, manifest, number, collectives, said["settings"])
    connection.sendall(json.dumps({"ready": number, "digest": manifest.digest}).encode() + b"\n")
    take_calls(rank, collectives, manifest.ranks.parallelism, number)
    rank.close()  # may take long, and wait for other ranks: it goes on saying that it lives
    closed.set()
    beat.join()


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


def _beat(connection: socket.socket, memory: Memory, rank: int, closed: threading.Event) -> None:
    """Say again and again that this process lives, and end it when rank 0 is lost before it closed the engine."""
    while not closed.is_set():
        memory.beat(rank)
        readable, _, _ = select.select([connection], [], [], _BEAT_S)
        if readable and not connection.recv(1):
            time.sleep(_BEAT_S)  # the main thread may be about to end by itself
            if not closed.is_set():
                os._exit(1)


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
