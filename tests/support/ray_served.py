"""`seekforge ray` in a process of its own, on a Ray of its own or on pretended nodes, and the processes below it.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.replicas import Load, check_after_kill, free_port, wait_until
from tests.support.served import alive

PYTHON = os.environ.get("SEEKFORGE_RAY_PYTHON") or (sys.executable if importlib.util.find_spec("ray") else "")
ABSENT = "ray is not installed; SEEKFORGE_RAY_PYTHON names a Python with it"
#: Words in the commands of an engine's process, and of another rank's.
ENGINE, RANK = "server.engine_process", "seekforge.runtime.ray.rank"
_OURS = (ENGINE, RANK, "ranks.worker")
#: Starts nodes with so many cores each, says where they are, and waits to be ended.
_NODES = """
import signal, sys
from ray.cluster_utils import Cluster
cluster = Cluster()
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
try:
    for cores in sys.argv[1:]:
        cluster.add_node(num_cpus=int(cores), include_dashboard=False)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    signal.pause()
finally:
    cluster.shutdown()
"""


@dataclass(frozen=True)
class Served:
    """What serves.

    Attributes:
        url: its address.
        roots: the processes below which all others are.
        log: what they say.
    """

    url: str
    roots: tuple[int, ...]
    log: Path

    def replicas(self) -> list[int]:
        """Return the actors that have an engine's process below them."""
        return sorted({parent_of(pid) for pid in self.processes(ENGINE)} - {0})

    def processes(self, word: str) -> list[int]:
        """Return the processes that are there and whose command has a word."""
        return sorted({pid for root in self.roots for pid in below(root) if word in command_of(pid)})


def command_of(pid: int) -> str:
    """Return the words of a process; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def variables_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}


def parent_of(pid: int) -> int:
    """Return the process that started one; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def below(parent: int) -> list[int]:
    """Return all processes that a process started, and those that they did."""
    parents = {pid: parent_of(pid) for pid in (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))}
    reached = [parent]
    for one in reached:
        reached += [pid for pid, its in parents.items() if its == one]
    return reached[1:]


@contextmanager
def serving(engine: Path, model: str, tmp_path: Path, *options: str, nodes: Sequence[int] = ()) -> Iterator[Served]:
    """Serve an engine; at the end nothing of it may be left.

    Args:
        engine: its folder.
        model: what requests call it.
        tmp_path: for logs.
        options: more options of `seekforge ray`.
        nodes: cores of each pretended node; none: the command starts a Ray of its own.
    """
    command = [PYTHON, "-m", "seekforge.runtime.ray", str(engine), "--port", str(free_port()), "--served-model-name"]
    command += [model, "--threads", "1", "--kv-cache-memory", "4M", "--json", *options]
    with running(command, tmp_path, nodes) as served:
        yield served


@contextmanager
def running(command: Sequence[str], tmp_path: Path, nodes: Sequence[int] = ()) -> Iterator[Served]:
    """Run a command that says where it serves (a line of JSON with `url`); at the end no engine may be left.

    Args:
        command: its words.
        tmp_path: for logs.
        nodes: cores of each pretended node, whose address is added as `--address`; none: it starts a Ray of its own.
    """
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(root / one) for one in ("exporter", "plugins", "runtime")),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = tmp_path / "ray.log"
    started: list[subprocess.Popen[str]] = []

    def start(words: Sequence[str]) -> str:
        with log.open("ab") as file:
            started.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, env=environment, text=True))
        assert started[-1].stdout is not None
        line = started[-1].stdout.readline()
        assert line, log.read_text()[-5000:]
        return line

    left: list[int] = []
    try:
        if nodes:
            command = [*command, "--address", start([PYTHON, "-c", _NODES, *map(str, nodes)]).strip()]
        url = json.loads(start(command))["url"]
        yield Served(url, tuple(one.pid for one in started), log)
    finally:
        left = [pid for one in started for pid in below(one.pid)]
        ours = [pid for pid in left if any(word in command_of(pid) for word in _OURS)]
        try:
            for one in reversed(started):
                one.terminate()
                one.wait(60)
            wait_until(lambda: not any(alive(pid) for pid in ours), 30, lambda: "a process of an engine was left")
        finally:  # agents of Ray wait for each other where its raylet had to be killed
            for pid in left:
                if alive(pid) and "ray" in command_of(pid):
                    os.kill(pid, signal.SIGKILL)


def check_a_killed_replica(served: Served, model: str, prompts: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    """Kill one of two replicas under load: what was on it is lost and nothing else, and then both answer again."""
    wait_until(lambda: len(served.replicas()) == 2)
    first, second = served.replicas()
    with Load(served.url, model, prompts) as load:
        load.until(lambda answers: len(answers) > 20)
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        load.until(lambda answers: sum(answer.began > killed + 5 for answer in answers) > 20)
        wait_until(lambda: len(now := served.replicas()) == 2 and first not in now, 120)
        assert second in served.replicas()
        again = time.monotonic()
        load.until(lambda answers: sum(answer.began > again for answer in answers) > 20)
    failed = check_after_kill(load.answers, texts, killed)
    assert len(failed) <= load.num_clients
