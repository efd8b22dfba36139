"""Processes that do a part of the work: what ends them, and what they leave."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from seekforge.common.errors import EnvironmentFault
from seekforge.common.workers import Workers


def leave_a_file_and_last(place: str) -> None:
    """Say that it has begun, and last for longer than anybody waits."""
    _, name = tempfile.mkstemp()
    Path(place).write_text(name)
    time.sleep(600)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def own_process() -> int:
    return os.getpid()


def test_an_interrupt_ends_them_and_what_waits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C goes to all: they hold it back, since this process ends them; what has not begun never does."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place, began = tmp_path / "began", 0.0
    with pytest.raises(KeyboardInterrupt), Workers(1, "sleeps") as workers:
        waiting = [workers.submit(leave_a_file_and_last, str(place)) for _ in range(3)]
        while not (place.exists() and place.read_text()):
            time.sleep(0.01)
        (one,) = multiprocessing.active_children()
        os.kill(one.pid or 0, signal.SIGINT)
        assert concurrent.futures.wait(waiting, 0.2).done == set() and one.is_alive()
        left = Path(place.read_text())
        assert left.is_file() and left.is_relative_to(tmp_path)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 20 and not multiprocessing.active_children()
    assert [path.name for path in tmp_path.iterdir()] == ["began"]


def test_one_that_was_killed_is_one_line() -> None:
    with pytest.raises(EnvironmentFault, match="a process that dies was ended from outside"), Workers(1, "dies") as one:
        one.submit(be_killed).result()


def test_what_fails_ends_at_once_every_time() -> None:
    """One that is killed may hold the lock of the queue that a later one waits for: half a second each, or for ever."""
    code = (
        "import operator\nfrom seekforge.common.workers import Workers\n"
        "if __name__ == '__main__':\n    for _ in range(8):\n"
        "        try:\n"
        "            with Workers(1, 'divides') as workers: workers.submit(operator.truediv, 1, 0).result()\n"
        "        except ZeroDivisionError: print('said')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.count("said") == 8


def test_each_part_has_a_process_of_its_own() -> None:
    with Workers(1, "tells") as workers:
        parts = [workers.submit(own_process) for _ in range(2)]
        first, second = (part.result() for part in parts)
    assert len({first, second, os.getpid()}) == 3
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
