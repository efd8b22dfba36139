"""Digests that find damage and its place: one XXH3 per chunk of a file, computed by several threads.

Every byte of an engine is compared with these whenever it is opened, so they must cost no more than reading does. Per
thread of one machine (Xeon with SHA extensions, bytes in memory) XXH3 takes 10.4 GB/s, CRC-32 3.3, BLAKE3 4.2, SHA-256
1.2 and BLAKE2b 0.6; the sum of the words, which is reading alone, 12. XXH3 is not made against somebody who wants a
collision: damage is an accident, and who may write an engine's files may write its manifest too. Files are read, not
mapped: a file that shrinks meanwhile is one line and not SIGBUS.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from seekforge.common.cores import usable_cores

#: A chunk is no smaller (xxhash lets other threads run from 100 kB on), and a file has no more of them.
_SMALLEST_CHUNK: Final = 128 << 10
_MOST_CHUNKS: Final = 4096
#: What a thread reads and hashes at once stays in its cache; what it takes from the queue at once.
_READ_BYTES: Final = 1 << 20
_TASK_BYTES: Final = 16 << 20
#: Unbuffered.
open_file = io.FileIO
#: More threads than this read no faster.
_MOST_THREADS: Final = 16


@dataclass(frozen=True)
class Damage:
    """Bytes [begin, end) of `path` are not what they were."""

    path: Path
    begin: int
    end: int


def chunk_bytes(size: int) -> int:
    """Return the length of the chunks of a file of `size` bytes: a power of two."""
    length = _SMALLEST_CHUNK
    while length * _MOST_CHUNKS < size:
        length *= 2
    return length


def num_chunks(size: int) -> int:
    """Return how many chunks a file of `size` bytes has; the last may be short."""
    return -(-size // chunk_bytes(size))


def chunk_digests(path: Path, *, threads: int | None = None) -> tuple[str, ...]:
    """Return the digest of every chunk of a file.

    Args:
        path: a regular file that nobody writes to meanwhile.
        threads: number of threads that read; None: the cores this process may use.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    digests = [""] * num_chunks(size)

    def note(_: Path, number: int, value: str) -> None:
        digests[number] = value

    _for_each_chunk([(path, size)], note, threads)
    return tuple(digests)


def damaged(
    files: Iterable[tuple[Path, int, Sequence[str]]],
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Damage]:
    """Return the places where files differ from their digests, in order; neighboring chunks are one place.

    Args:
        files: path, size in bytes and digest of each chunk.
        threads: number of threads that read; None: the cores this process may use.
        progress: called with how many more bytes were compared, by the threads that read.

    Raises:
        OSError: a file cannot be read, or is shorter than it should be.
    """
    expected = {path: (size, digests) for path, size, digests in files}
    bad: list[Damage] = []

    def compare(path: Path, number: int, value: str) -> None:
        size, digests = expected[path]
        length = chunk_bytes(size)
        if value != digests[number]:
            bad.append(Damage(path, number * length, min((number + 1) * length, size)))
        if progress is not None:
            progress(min(length, size - number * length))

    _for_each_chunk([(path, size) for path, (size, _) in expected.items()], compare, threads)
    order = {path: i for i, path in enumerate(expected)}
    joined: list[Damage] = []
    for one in sorted(bad, key=lambda one: (order[one.path], one.begin)):
        if joined and (joined[-1].path, joined[-1].end) == (one.path, one.begin):
            one = Damage(one.path, joined.pop().begin, one.end)
        joined.append(one)
    return joined


def _for_each_chunk(
    files: Sequence[tuple[Path, int]], tell: Callable[[Path, int, str], None], threads: int | None
) -> None:
    """Tell the digest of every chunk of files of (path, size); in any order, from several threads."""
    tasks = iter(list(_tasks(files)))
    lock, stop = threading.Lock(), threading.Event()
    room = threads or min(usable_cores(), _MOST_THREADS)

    def work() -> None:
        buffer = memoryview(bytearray(min(_READ_BYTES, max((size for _, size in files), default=0))))
        while not stop.is_set():
            with lock:
                task = next(tasks, None)
            if task is None:
                return
            try:
                for number, value in _digests_of(*task, buffer):
                    tell(task[0], number, value)
            except BaseException:
                stop.set()
                raise

    if sum(size for _, size in files) <= _TASK_BYTES:  # not worth a thread
        work()
        return
    with ThreadPoolExecutor(room, "digests") as pool:
        try:
            for future in [pool.submit(work) for _ in range(room)]:
                future.result()
        finally:
            stop.set()  # an interrupt reaches this thread alone


def _tasks(files: Iterable[tuple[Path, int]]) -> Iterator[tuple[Path, int, range]]:
    """Yield (path, size, some of its chunks)."""
    for path, size in files:
        step = max(_TASK_BYTES // chunk_bytes(size), 1)
        for start in range(0, num_chunks(size), step):
            yield path, size, range(start, min(start + step, num_chunks(size)))


def _digests_of(path: Path, size: int, chunks: range, buffer: memoryview) -> Iterator[tuple[int, str]]:
    length = chunk_bytes(size)
    with open_file(path) as file:
        file.seek(chunks.start * length)
        for number in chunks:
            state = xxhash.xxh3_64()
            left = min(length, size - number * length)
            while left:
                count = file.readinto(buffer[:left])
                if not count:
                    raise OSError(None, f"ends {left} bytes early: it shrank while it was read", str(path))
                state.update(buffer[:count])
                left -= count
            yield number, state.hexdigest()
