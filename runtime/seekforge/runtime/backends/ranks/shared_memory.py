"""`Collectives` of ranks on one machine: a shared memory without a name, and counters in it.

The memory belongs to a file that was never in a folder (`memfd_create`): ranks get it through a socket, and when the
last of them ends, however it ends, it is gone.

Each counter is written by one rank alone. A waiting rank looks at it again and again, gives the core away between
looks, and after some milliseconds sleeps between them: an idle engine costs next to nothing, and a step no wake-up.
Where there are fewer cores than ranks it sleeps at once, since whoever it waits for needs the core.
While it waits it asks now and then whether all ranks live (`alarm`).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from seekforge.common.cores import usable_cores
from seekforge.common.errors import EngineError
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks.message import Message

#: Bytes between counters, so that no two share a line of a processor's cache.
_LINE: Final = 128
#: Bytes of a piece of a message, and of a piece of a sum.
_MESSAGE_BYTES, _SUM_BYTES = 1 << 18, 1 << 20
#: Bytes before a part of a sum: its length, and how many pieces of broadcasts its rank has had.
_SUM_HEAD: Final = 16
#: Pieces of messages that a reader may be behind; two sums are under way at most.
_PLACES, _SUMS = 4, 2
#: Looks at a counter before the waiting rank begins to sleep between them, and how long it sleeps then.
_SPINS, _NAP_S = 20_000, 0.0005
#: The same where ranks share cores: each look would delay the rank that is waited for.
_SPINS_ON_SHARED_CORES: Final = 64
#: Looks after which the rank asks whether all others live.
_ALARM_EVERY = 256

#: Called while a rank waits; raises when there is nothing to wait for any more.
Alarm = Callable[[], None]


@dataclass(frozen=True)
class _Places:
    """Where in the memory everything lies, as it follows from the layout of ranks."""

    parallelism: Parallelism

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(source, target) of every `send`: to the same place of the next stage, and from each stage to rank 0."""
        tp, ranks = self.parallelism.tp, self.parallelism.num_ranks
        onward = [(rank, rank + tp) for rank in range(ranks - tp)]
        back = [(stage * tp, 0) for stage in range(1, self.parallelism.pp)]
        return onward + back

    @property
    def num_counters(self) -> int:
        ranks = self.parallelism.num_ranks
        return 1 + 2 * ranks + (1 + ranks) + 2 * len(self.pairs)

    @property
    def sums_at(self) -> int:
        return -(-self.num_counters * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def messages_at(self) -> int:
        return self.sums_at + self.parallelism.num_ranks * _SUMS * _SUM_BYTES

    @property
    def num_bytes(self) -> int:
        return self.messages_at + (1 + len(self.pairs)) * _PLACES * _MESSAGE_BYTES


class Memory:
    """The memory that ranks share.

    Attributes:
        fd: the file descriptor of it, which another process opens it by.
    """

    def __init__(self, parallelism: Parallelism, fd: int | None = None) -> None:
        """Make it, or open the one behind a descriptor."""
        self.places = _Places(parallelism)
        if fd is None:
            fd = _unnamed_file()
            os.ftruncate(fd, self.places.num_bytes)
        self.fd = fd
        self.map = mmap.mmap(fd, self.places.num_bytes)
        self._counters = memoryview(self.map)[: self.places.sums_at].cast("q")
        self._fence = threading.Lock()

    def read(self, counter: int) -> int:
        """Return a counter; what was written before it was raised is visible after."""
        value = self._counters[counter * _LINE // 8]
        with self._fence:  # orders memory on processors that do not do so by themselves
            return value

    def write(self, counter: int, value: int) -> None:
        """Set a counter, after everything that was written before."""
        with self._fence:
            self._counters[counter * _LINE // 8] = value

    def array(self, offset: int, num_bytes: int) -> np.ndarray:
        """Return a part of the memory as bytes."""
        return np.frombuffer(self.map, np.uint8, num_bytes, offset)

    def beat(self, rank: int) -> None:
        """Say that the process of a rank lives; called again and again by a thread of it."""
        self.write(1 + rank, self.read(1 + rank) + 1)

    def beats(self, rank: int) -> int:
        """Return how often a rank said that it lives."""
        return self.read(1 + rank)

    def close(self) -> None:
        """Give it back, as far as nobody here looks at it any more."""
        os.close(self.fd)


class SharedMemory:
    """The `Collectives` of one rank."""

    def __init__(self, memory: Memory, rank: int, alarm: Alarm) -> None:
        parallelism = memory.places.parallelism
        self._memory, self._rank, self._alarm = memory, rank, alarm
        ranks, tp = parallelism.num_ranks, parallelism.tp
        self._spins = _SPINS if ranks <= usable_cores() else _SPINS_ON_SHARED_CORES
        counters = 1 + ranks  # of sums; after them those of the broadcast, then two of each pair
        first = rank // tp * tp
        self._group = range(first, first + tp)
        self._arrivals = [counters + member for member in self._group]
        self._num_sums = 0
        self._slots = [
            [
                memory.array(memory.places.sums_at + (member * _SUMS + which) * _SUM_BYTES, _SUM_BYTES)
                for member in self._group
            ]
            for which in range(_SUMS)
        ]
        counters += ranks
        place = memory.places.messages_at
        others = [counters + 1 + other for other in range(1, ranks)]
        self._broadcast = _Channel(self, counters, others, place, None if rank == 0 else counters + 1 + rank)
        counters, place = counters + 1 + ranks, place + _PLACES * _MESSAGE_BYTES
        self._channels: dict[tuple[int, int], _Channel] = {}
        for source, target in memory.places.pairs:
            if rank in (source, target):
                reads = counters + 1
                channel = _Channel(self, counters, [reads], place, None if rank == source else reads)
                self._channels[source, target] = channel
            counters, place = counters + 2, place + _PLACES * _MESSAGE_BYTES

    def broadcast(self, message: Message | None = None) -> Message:
        """See `Collectives`."""
        if message is None:
            return self._broadcast.receive()
        self._broadcast.send(message)
        return message

    def sum(self, part: np.ndarray) -> np.ndarray:
        """See `Collectives`."""
        if len(self._group) == 1:
            return part
        flat = np.ascontiguousarray(part).reshape(-1)
        result = np.empty_like(flat)
        most = (_SUM_BYTES - _SUM_HEAD) // flat.itemsize
        for start in range(0, max(len(flat), 1), most):
            self._sum_piece(flat[start : start + most], result[start : start + most])
        return result.reshape(part.shape)

    def send(self, message: Message | None, *, source: int, target: int) -> Message:
        """See `Collectives`."""
        channel = self._channels[source, target]
        if self._rank != source:
            return channel.receive()
        assert message is not None
        channel.send(message)
        return message

    def close(self) -> None:
        """See `Collectives`."""
        self._memory.close()

    def _sum_piece(self, part: np.ndarray, result: np.ndarray) -> None:
        """Lay a part down, wait for those of the others, and add them up; heads say how long they are, of which step.

        The next sum has other slots. The one after it has these again: no rank is there before all have left this one,
        since all have come to the next.
        """
        slots = self._slots[self._num_sums % _SUMS]
        own_slot = slots[self._rank - self._group.start]
        step = self._broadcast.count
        own_slot[:_SUM_HEAD].view(np.int64)[:] = part.nbytes, step
        own_slot[_SUM_HEAD : _SUM_HEAD + part.nbytes].view(part.dtype)[:] = part
        self._num_sums += 1
        self._memory.write(self._arrivals[self._rank - self._group.start], self._num_sums)
        for arrival in self._arrivals:
            self.wait(lambda counter=arrival: self._memory.read(counter) >= self._num_sums)
        sizes, steps = zip(*(slot[:_SUM_HEAD].view(np.int64).tolist() for slot in slots), strict=True)
        if set(sizes) != {part.nbytes}:
            wrong = next(member for member, size in zip(self._group, sizes, strict=True) if size != part.nbytes)
            raise EngineError(
                f"rank {wrong} adds {sizes[wrong - self._group.start]} bytes where rank {self._rank} adds "
                f"{part.nbytes}: they are not in the same step; start the engine again and report this"
            )
        if set(steps) != {step}:
            wrong = next(member for member, other in zip(self._group, steps, strict=True) if other != step)
            raise EngineError(
                f"rank {wrong} adds after {steps[wrong - self._group.start]} pieces of broadcasts, rank {self._rank} "
                f"after {step}: they are not in the same step; start the engine again and report this"
            )
        values = [slot[_SUM_HEAD : _SUM_HEAD + part.nbytes].view(part.dtype) for slot in slots]
        np.add(values[0], values[1], out=result)
        for value in values[2:]:
            np.add(result, value, out=result)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Return when something holds.

        Raises:
            EngineError: of `alarm`.
        """
        looks = 0
        while not ready():
            looks += 1
            if looks % _ALARM_EVERY == 0 or looks > self._spins:
                self._alarm()
            if looks > self._spins:
                time.sleep(_NAP_S)
            elif looks > 64:
                os.sched_yield()

    @property
    def memory(self) -> Memory:
        """The memory."""
        return self._memory


class _Channel:
    """Messages from one rank to one or more others, in pieces that lie in a ring.

    Attributes:
        count: pieces that this rank has written, or read.
    """

    def __init__(self, owner: SharedMemory, written: int, reads: Sequence[int], place: int, reader: int | None) -> None:
        """`written`, `reads`: counters of pieces. `reader`: that of this rank, which else is the writer."""
        self._owner, self._memory = owner, owner.memory
        self._written, self._reads, self._reader = written, reads, reader
        self._slots = [self._memory.array(place + i * _MESSAGE_BYTES, _MESSAGE_BYTES) for i in range(_PLACES)]
        self.count = 0

    def send(self, message: Message) -> None:
        """Write a message; waits while readers are behind."""
        pieces = message.pack()
        total = sum(len(piece) for piece in pieces)
        slot, filled = self._next_slot(), 8
        slot[:8].view(np.int64)[0] = total
        for piece in pieces:
            at = 0
            while at < len(piece):
                if filled == _MESSAGE_BYTES:
                    self._publish()
                    slot, filled = self._next_slot(), 0
                count = min(len(piece) - at, _MESSAGE_BYTES - filled)
                slot[filled : filled + count] = np.frombuffer(piece, np.uint8, count, at)
                at, filled = at + count, filled + count
        self._publish()

    def receive(self) -> Message:
        """Return the next message; waits for it."""
        slot = self._arrived()
        total = int(slot[:8].view(np.int64)[0])
        data, at, start = bytearray(total), 0, 8
        while True:
            count = min(total - at, _MESSAGE_BYTES - start)
            data[at : at + count] = slot[start : start + count].tobytes()
            self.count += 1
            assert self._reader is not None
            self._memory.write(self._reader, self.count)
            at, start = at + count, 0
            if at == total:
                return Message.unpack(data)
            slot = self._arrived()

    def _next_slot(self) -> np.ndarray:
        for reads in self._reads:
            self._owner.wait(lambda counter=reads: self.count - self._memory.read(counter) < _PLACES)
        return self._slots[self.count % _PLACES]

    def _publish(self) -> None:
        self.count += 1
        self._memory.write(self._written, self.count)

    def _arrived(self) -> np.ndarray:
        self._owner.wait(lambda: self._memory.read(self._written) > self.count)
        return self._slots[self.count % _PLACES]


def _unnamed_file() -> int:
    """Return the descriptor of a file that is in no folder."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("seekforge-ranks", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
