"""Two replicas under a local Ray, one of which is killed under load.

Ray is no part of the environment that the other tests have: SEEKFORGE_RAY_PYTHON names an interpreter that has it
beside what an engine needs, unless this one does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.replicas import Load, check_after_kill, completion, expected_texts, free_port, wait_until
from tests.support.served import alive

PYTHON = os.environ.get("SEEKFORGE_RAY_PYTHON") or (sys.executable if importlib.util.find_spec("ray") else "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="ray is not installed; SEEKFORGE_RAY_PYTHON names a Python with it"),
]
PROMPTS = [[5 + i, 9, 20 + 3 * i, 7] for i in range(8)]
MODEL = "toy"


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def below(parent: int) -> list[int]:
    """Return all processes that a process started, and those that they did."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    reached = [parent]
    for one in reached:
        reached += [pid for pid, its in parents.items() if its == one]
    return reached[1:]


@pytest.fixture
def served(toy_engine: Path, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """Two replicas: their address, and the process that started them."""
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(root / one) for one in ("exporter", "plugins", "runtime")),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        PYTHON,
        "-m",
        "seekforge.runtime.ray",
        str(toy_engine),
        "--num-replicas",
        "2",
        "--port",
        str(free_port()),
    ]
    command += ["--served-model-name", MODEL, "--threads", "1", "--kv-cache-memory", "4M", "--json"]
    log = tmp_path / "ray.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=environment, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()[-5000:]
        yield json.loads(line)["url"], process
    finally:
        started = below(process.pid)
        engines = [pid for pid in started if "server.engine_process" in command_of(pid)]
        process.terminate()
        try:
            process.wait(60)
            wait_until(lambda: not any(alive(pid) for pid in engines), 30, lambda: "an engine was left")
        finally:  # agents of Ray wait for each other where its raylet had to be killed
            for pid in started:
                if alive(pid) and "ray" in command_of(pid):
                    os.kill(pid, signal.SIGKILL)


def test_a_replica_that_is_killed_under_load_loses_what_was_on_it(served: tuple[str, Any], toy_engine: Path) -> None:
    url, process = served
    texts = expected_texts(toy_engine, PROMPTS)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert completion(url, MODEL, prompt) == text

    def replicas() -> list[int]:
        """Return the actors that have an engine below them."""
        engines = [pid for pid in below(process.pid) if "server.engine_process" in command_of(pid)]
        return sorted(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in engines)

    wait_until(lambda: len(replicas()) == 2)
    first, second = replicas()
    with Load(url, MODEL, PROMPTS) as load:
        load.until(lambda answers: len(answers) > 20)
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        load.until(lambda answers: sum(answer.began > killed + 5 for answer in answers) > 20)
        wait_until(lambda: len(replicas()) == 2 and first not in replicas() and second in replicas(), 120)
        again = time.monotonic()
        load.until(lambda answers: sum(answer.began > again for answer in answers) > 20)
    failed = check_after_kill(load.answers, texts, killed)
    assert len(failed) <= load.num_clients
