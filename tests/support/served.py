"""`seekforge serve` in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def served(engine: Path, port: str = "0", *options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Run `seekforge serve` and give the process, its address, and its lines so far."""
    command = [sys.executable, "-m", "seekforge", "serve", str(engine), "--port", port, "--threads", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines: list[str] = []
    assert process.stderr is not None
    reading = threading.Thread(target=lines.extend, args=(process.stderr,))  # else the pipe fills up
    reading.start()
    try:
        while not (address := re.search(r"http://\S+", "".join(lines))):
            assert process.poll() is None, "".join(lines)
            time.sleep(0.02)
        yield process, address[0], lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reading.join()


def post(url: str, body: dict[str, Any]) -> Any:
    """Send JSON; returns the answer, open."""
    data = json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, {"content-type": "application/json"}), timeout=60)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits for its parent does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def engine_of(process: subprocess.Popen[str]) -> int:
    """The process of the engine."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
