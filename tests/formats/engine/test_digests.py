"""Every chunk of a file has a digest, and damage is found where it is."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from seekforge.formats.engine import digests
from seekforge.formats.engine.digests import Damage, chunk_bytes, chunk_digests, damaged, num_chunks

CHUNK = 128 << 10


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_a_file_of_any_size_has_a_digest_for_each_chunk(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(size).randbytes(size))
    found = chunk_digests(path)
    assert len(found) == num_chunks(size) == -(-size // CHUNK)
    assert len(set(found)) == len(found)
    assert damaged([(path, size, found)]) == []


def test_no_file_has_more_than_4096_chunks() -> None:
    for size in (1, 1 << 29, (1 << 29) + 1, 700_000_000_000):
        assert num_chunks(size) <= 4096
        assert chunk_bytes(size) * num_chunks(size) >= size
    assert chunk_bytes(1 << 29) == CHUNK
    assert chunk_bytes((1 << 29) + 1) == 2 * CHUNK


@pytest.mark.parametrize("threads", [1, 3])
def test_damage_is_found_where_it_is_by_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(digests, "_TASK_BYTES", 2 * CHUNK)  # so that there is work for several
    size = 9 * CHUNK + 100
    first, second = tmp_path / "first", tmp_path / "second"
    raw = bytearray(random.Random(1).randbytes(size))
    for path in (first, second):
        path.write_bytes(raw)
    expected = chunk_digests(first, threads=threads)
    assert expected == chunk_digests(second, threads=1)
    for place in (2 * CHUNK, 4 * CHUNK - 1, size - 1):  # two chunks side by side, and the short one at the end
        raw[place] ^= 0x10
    second.write_bytes(raw)
    told: list[int] = []
    found = damaged([(first, size, expected), (second, size, expected)], threads=threads, progress=told.append)
    assert found == [Damage(second, 2 * CHUNK, 4 * CHUNK), Damage(second, 9 * CHUNK, size)]
    assert sum(told) == 2 * size


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    with pytest.raises(OSError, match="shrank while it was read"):
        damaged([(path, 11, ("",))])


def test_an_interrupt_ends_the_other_threads_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the thread that waits for them: Ctrl-C was heard when the last of 690 GB had been read."""
    began: list[range] = []

    def slow(path: Path, size: int, chunks: range, buffer: memoryview) -> Iterator[tuple[int, str]]:
        began.append(chunks)
        if len(began) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        yield chunks.start, ""

    monkeypatch.setattr(digests, "_digests_of", slow)
    monkeypatch.setattr(digests, "_TASK_BYTES", CHUNK)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            damaged([(tmp_path / "file", 400 * CHUNK, ("",) * 400)], threads=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 3 <= len(began) < 50
