"""`Collectives` of ranks on several machines: a TCP connection between every two ranks that tell each other something.

What passes is `Message`s, plain values and arrays: nothing is unpickled. Each has a head with what call it belongs to,
and how many messages went this way before, so ranks that are not in the same step find out at once. Sums are gathered
by the first rank of a stage, which adds them in the order of ranks and gives the result back: the same bits on all of
them, and as on one machine.

Who connects has to know the secret of the engine's ranks (`prove`): it decides who comes in. What passes afterwards is
neither encrypted nor signed; the network between the machines has to be a trusted one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from seekforge.common.errors import EngineError
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks.message import Message

#: Called while a rank waits; raises when there is nothing to wait for any more.
Alarm = Callable[[], None]

#: Head of a message: the kind of its call, its number on this connection, and its bytes.
_HEAD: Final = struct.Struct("!cQQ")
_BROADCAST, _SUM, _SEND = b"b", b"s", b"m"
_NAMES: Final = {_BROADCAST: "a broadcast", _SUM: "a sum", _SEND: "what a stage sends"}
#: Most bytes of a message.
_MOST_BYTES: Final = 1 << 36
#: Seconds that a wait lasts before the alarm is asked.
_ALARM_S: Final = 0.2
#: Seconds that rank 0 has to say which rank is lost, before one that lost a connection to it says what it knows.
_LAST_WORDS_S: Final = 2.0
#: Bytes of a number that is used once, and of an answer to it.
_NONCE_BYTES, _PROOF_BYTES = 32, 32


def linked_pairs(parallelism: Parallelism) -> list[tuple[int, int]]:
    """Return every two ranks that tell each other something, the lower one first."""
    tp, ranks = parallelism.tp, parallelism.num_ranks
    pairs = {(0, rank) for rank in range(1, ranks)}
    pairs |= {(rank // tp * tp, rank) for rank in range(ranks) if rank % tp}
    pairs |= {(rank, rank + tp) for rank in range(ranks - tp)}
    return sorted(pairs)


class Network:
    """The `Collectives` of one rank.

    Args:
        parallelism: how many ranks there are.
        rank: which of them this is.
        links: rank -> connection to it, for each that it is linked with.
        alarm: called now and then while the rank waits.
    """

    def __init__(self, parallelism: Parallelism, rank: int, links: Mapping[int, socket.socket], alarm: Alarm) -> None:
        self._rank, self._tp, self._num_ranks = rank, parallelism.tp, parallelism.num_ranks
        self._links = {other: _Link(rank, other, end, alarm) for other, end in links.items()}
        first = rank // self._tp * self._tp
        self._group = range(first, first + self._tp)

    def broadcast(self, message: Message | None = None) -> Message:
        """See `Collectives`."""
        if message is None:
            return self._links[0].receive(_BROADCAST)
        pieces = message.pack()
        for rank in range(1, self._num_ranks):
            self._links[rank].send(_BROADCAST, pieces)
        return message

    def sum(self, part: np.ndarray) -> np.ndarray:
        """See `Collectives`."""
        if len(self._group) == 1:
            return part
        first, others = self._group[0], self._group[1:]
        if self._rank != first:
            link = self._links[first]
            link.send(_SUM, Message(arrays={"part": part}).pack())
            return link.receive(_SUM).arrays["part"]
        result = np.array(part)
        for rank in others:
            other = self._links[rank].receive(_SUM).arrays["part"]
            if other.shape != part.shape or other.dtype != part.dtype:
                raise EngineError(
                    f"rank {rank} adds {other.dtype}{list(other.shape)} where rank {first} adds "
                    f"{part.dtype}{list(part.shape)}: they are not in the same step; start the engine again and report "
                    "this"
                )
            np.add(result, other, out=result)
        pieces = Message(arrays={"part": result}).pack()
        for rank in others:
            self._links[rank].send(_SUM, pieces)
        return result

    def send(self, message: Message | None, *, source: int, target: int) -> Message:
        """See `Collectives`."""
        if self._rank != source:
            return self._links[source].receive(_SEND)
        assert message is not None
        self._links[target].send(_SEND, message.pack())
        return message

    def close(self) -> None:
        """See `Collectives`."""
        for link in self._links.values():
            link.close()


class _Link:
    """The connection to one other rank."""

    def __init__(self, rank: int, other: int, end: socket.socket, alarm: Alarm) -> None:
        self._rank, self._other, self._socket, self._alarm = rank, other, end, alarm
        self._sent, self._received = 0, 0
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.settimeout(_ALARM_S)

    def send(self, kind: bytes, pieces: Sequence[memoryview]) -> None:
        """Send a message."""
        self._sent += 1
        self._write(memoryview(_HEAD.pack(kind, self._sent, sum(len(piece) for piece in pieces))))
        for piece in pieces:
            self._write(piece)

    def receive(self, kind: bytes) -> Message:
        """Return the next message, which is of this kind."""
        self._received += 1
        came, count, num_bytes = _HEAD.unpack(self._read(_HEAD.size))
        if (came, count) != (kind, self._received) or num_bytes > _MOST_BYTES:
            raise EngineError(
                f"rank {self._rank} waits for {_NAMES[kind]}, message {self._received}, and rank {self._other} sends "
                f"{_NAMES.get(came, 'something else')}, message {count}: they are not in the same step; start the "
                "engine again and report this"
            )
        return Message.unpack(self._read(num_bytes))

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                count = self._socket.send(data)
            except TimeoutError:
                self._alarm()
            except OSError as error:
                raise self._gone() from error
            else:
                data = data[count:]

    def _read(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            try:
                count = self._socket.recv_into(view)
            except TimeoutError:
                self._alarm()
            except OSError as error:
                raise self._gone() from error
            else:
                if not count:
                    raise self._gone()
                view = view[count:]
        return data

    def _gone(self) -> EngineError:
        """Return why this rank cannot go on, if nobody who knows more ends it within a moment."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < deadline:
            self._alarm()
            time.sleep(_ALARM_S / 4)
        return EngineError(f"rank {self._rank} lost its connection to rank {self._other}; start the engine again")


def prove(end: socket.socket, secret: bytes, purpose: bytes, *, asks: bool) -> bool:
    """Return whether the other end of a connection knows the secret; it learns the same of this one.

    Each end sends a number that is used once, and answers that of the other with what only the secret makes of both. So
    an answer that was overheard is worth nothing, and neither end can be made to answer itself: what it makes of the
    numbers depends on who connected.

    Args:
        end: the connection, with a timeout.
        secret: what both know.
        purpose: what the connection is for, which both say.
        asks: whether this end is the one that connected.

    Raises:
        OSError: the other end says nothing, or is gone.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    end.sendall(nonce)
    other = _exactly(end, _NONCE_BYTES)
    numbers = (nonce, other) if asks else (other, nonce)

    def proof(role: bytes) -> bytes:
        return hmac.digest(secret, b"\0".join((b"seekforge ranks", role, purpose)) + b"".join(numbers), hashlib.sha256)

    if asks:
        end.sendall(proof(b"asks"))
        return hmac.compare_digest(_exactly(end, _PROOF_BYTES), proof(b"answers"))
    knows = hmac.compare_digest(_exactly(end, _PROOF_BYTES), proof(b"asks"))
    end.sendall(proof(b"answers") if knows else bytes(_PROOF_BYTES))  # a stranger gets nothing to try secrets on
    return knows


def _exactly(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = end.recv(count - len(data))
        if not more:
            raise ConnectionResetError("the other end of the connection is gone")
        data += more
    return data
