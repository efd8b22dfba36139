"""How ranks on several machines find each other, and who is let in.

Rank 0 listens beside the port that the launcher's variables name, which the launcher itself may hold. Every other rank
connects to it, says its number, and shows that it knows the secret of the environment; rank 0 shows the same. Then
rank 0 tells all of them where each listens, and every two that have something to tell each other connect likewise.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from seekforge.common.errors import EngineError
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks.network import linked_pairs, prove

#: The variable with what all ranks know and nobody else.
SECRET: Final = "SEEKFORGE_RANKS_SECRET"
#: Fewer characters than that are no secret.
_LEAST_SECRET: Final = 16
#: Seconds that ranks may come later than rank 0, and that those which came need to connect with each other.
_MEETING_S, _LINKING_S = 120.0, 30.0
#: Seconds between two tries to reach a rank, and that a stranger may say nothing.
_RETRY_S, _STRANGER_S = 0.1, 2.0
#: Bytes of the line that a connection begins with, and milliseconds after which an unreachable machine is given up.
_MOST_LINE, _UNREACHABLE_MS = 64, 10_000

#: rank -> where it listens.
Addresses = Mapping[int, tuple[str, int]]


@dataclass(frozen=True)
class Meeting:
    """Where ranks of several machines meet.

    Attributes:
        address: the address of rank 0's machine.
        port: where rank 0 listens.
        secret: what all of them know.
    """

    address: str
    port: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class Arrival:
    """A rank that came to rank 0.

    Attributes:
        rank: which it is.
        connection: the connection to it.
        address: where it listens.
    """

    rank: int
    connection: socket.socket
    address: tuple[str, int]


def meeting_of(environment: Mapping[str, str], port: int) -> Meeting:
    """Return where ranks meet whose launcher set these variables.

    Args:
        environment: the variables.
        port: MASTER_PORT; the launcher may listen there itself.

    Raises:
        EngineError: there is no address, or no secret.
    """
    address, secret = environment.get("MASTER_ADDR", ""), environment.get(SECRET, "")
    if not address or not 0 < port < 65535:
        raise EngineError(
            "ranks on several machines meet where MASTER_ADDR and MASTER_PORT say; set both to those of rank 0"
        )
    if len(secret) < _LEAST_SECRET:
        raise EngineError(
            f"ranks on several machines let in who knows {SECRET}; set it to the same text of at least {_LEAST_SECRET} "
            "characters for all, and keep it from others"
        )
    return Meeting(address, port + 1, secret.encode())


def local_number(rank: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of a rank among those of its machine, which is that of its GPU there."""
    local, size = environment.get("LOCAL_RANK", ""), environment.get("LOCAL_WORLD_SIZE")
    across = size is not None and size != environment.get("WORLD_SIZE")
    return int(local) if across and local.isdecimal() and len(local) < 10 else rank


def listening(port: int = 0) -> socket.socket:
    """Return a socket that listens at all addresses of this machine; 0: at a port that is free.

    Raises:
        EngineError: somebody else has the port.
    """
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise EngineError(
            f"rank 0 cannot listen at port {port}, one above MASTER_PORT ({error.strerror}); set another MASTER_PORT"
        ) from None


def gather(meeting: Meeting, num_ranks: int, server: socket.socket) -> list[Arrival]:
    """Wait for all ranks but 0; they come back in their order.

    Raises:
        EngineError: one did not come, or came twice.
    """
    arrivals: dict[int, Arrival] = {}
    deadline = time.monotonic() + _MEETING_S
    while len(arrivals) < num_ranks - 1:
        try:
            end, words = _admitted(server, meeting.secret, deadline)
        except TimeoutError:
            missing = min(set(range(1, num_ranks)) - set(arrivals))
            raise EngineError(
                f"rank {missing} did not come within {_MEETING_S:.0f} s; start all {num_ranks} ranks, with one {SECRET}"
            ) from None
        if words[0] != "rank" or len(words) != 3:
            end.close()
            continue
        rank, port = int(words[1]), int(words[2])
        if not 1 <= rank < num_ranks or rank in arrivals:
            raise EngineError(f"rank {rank} came twice or is none of {num_ranks}; give each its own RANK")
        arrivals[rank] = Arrival(rank, end, (end.getpeername()[0], port))
    return [arrivals[rank] for rank in sorted(arrivals)]


def come(meeting: Meeting, rank: int, server: socket.socket) -> socket.socket:
    """Return the connection of a rank to rank 0.

    Raises:
        EngineError: rank 0 did not come, or knows another secret.
    """
    line = f"rank {rank} {server.getsockname()[1]}"
    return _reached((meeting.address, meeting.port), line, meeting.secret, "rank 0")


def link(
    parallelism: Parallelism, rank: int, addresses: Addresses, server: socket.socket, secret: bytes
) -> dict[int, socket.socket]:
    """Connect with every rank that this one tells something, or hears from.

    Each connects to those below it and then waits for those above, so nobody waits in a circle.

    Args:
        parallelism: how many ranks there are.
        rank: this one.
        addresses: where each rank listens.
        server: where this one does.
        secret: what all of them know.

    Raises:
        EngineError: one did not come.
    """
    pairs = linked_pairs(parallelism)
    links = {
        low: _reached(addresses[low], f"link {rank} {low}", secret, f"rank {low}")
        for low, high in pairs
        if high == rank
    }
    above = {high for low, high in pairs if low == rank}
    deadline = time.monotonic() + _LINKING_S
    while above:
        try:
            end, words = _admitted(server, secret, deadline)
        except TimeoutError:
            raise EngineError(f"rank {min(above)} did not reach rank {rank} within {_LINKING_S:.0f} s") from None
        if words[0] != "link" or len(words) != 3 or int(words[2]) != rank or int(words[1]) not in above:
            end.close()
            continue
        links[int(words[1])] = end
        above.remove(int(words[1]))
    return links


def _admitted(server: socket.socket, secret: bytes, deadline: float) -> tuple[socket.socket, list[str]]:
    """Return the next connection of somebody who knows the secret, and the words that it began with."""
    while True:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        end, _ = server.accept()
        end.settimeout(_STRANGER_S)
        try:
            line = _line(end)
            if prove(end, secret, line, asks=False):
                words = line.decode().split()
                if words and all(word.isascii() and word.isdigit() and len(word) < 10 for word in words[1:]):
                    _keep_alive(end)
                    return end, words
        except (OSError, ValueError):
            pass
        end.close()  # a stranger, or one that gave up


def _reached(address: tuple[str, int], line: str, secret: bytes, name: str) -> socket.socket:
    deadline = time.monotonic() + _MEETING_S
    while True:
        try:
            end = socket.create_connection(address, _STRANGER_S * 5)
            try:
                end.sendall(line.encode() + b"\n")
                if prove(end, secret, line.encode(), asks=True):
                    _keep_alive(end)
                    return end
            except BaseException:
                end.close()
                raise
            end.close()
            raise EngineError(f"{name} ({address[0]}:{address[1]}) knows another {SECRET}; give all ranks the same")
        except OSError:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{name} was not reached at {address[0]}:{address[1]} within {_MEETING_S:.0f} s; start it too"
                ) from None
            time.sleep(_RETRY_S)


def _line(end: socket.socket) -> bytes:
    """Return the first line of a connection, and nothing of what follows."""
    line = b""
    while not line.endswith(b"\n"):
        one = end.recv(1)
        if not one or len(line) > _MOST_LINE:
            raise ValueError("no line")
        line += one
    return line[:-1]


def _keep_alive(end: socket.socket) -> None:
    """Let the connection wait, and end when the other machine is not there any more."""
    end.settimeout(None)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREACHABLE_MS)
