"""torchrun itself starts the ranks: two on one machine, or one on each of two "machines", which are localhost both."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.rank_engines import rank_engine

from seekforge.formats.parallelism import Parallelism
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.backends.ranks.nodes import SECRET

pytestmark = pytest.mark.slow  # torchrun imports PyTorch, and the ranks ONNX Runtime, each in a process of its own

#: What every rank runs: it leaves its process's number, and rank 0 says what it got.
_SCRIPT = """
import os, sys
from pathlib import Path
from seekforge import LLM, SamplingParams
from seekforge.common.errors import SeekforgeError
Path(sys.argv[2], os.environ["RANK"]).write_text(str(os.getpid()))
try:
    with LLM(sys.argv[1], num_blocks=9, num_speculative_tokens=1, threads=1) as llm:
        while True:
            outputs = llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=12, temperature=0))
            print([output.outputs[0].token_ids for output in outputs], flush=True)
            if len(sys.argv) < 4:
                break
except SeekforgeError as error:
    sys.exit(f"error: {error}")
"""


class Launch:
    """What torchrun started: its own processes, one a machine, and the ranks'."""

    def __init__(self, engine: Path, folder: Path, machines: int, *words: str, options: tuple[str, ...] = ()) -> None:
        self.folder = folder
        (folder / "ask.py").write_text(_SCRIPT)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), SECRET: "known to the ranks of a test"}
        port = str(random.randrange(20_000, 30_000))
        self.launchers: list[subprocess.Popen[str]] = []
        for machine in range(machines):
            nodes = ("--nnodes", str(machines), "--node-rank", str(machine), "--nproc-per-node", str(2 // machines))
            meeting = ("--master-addr", "127.0.0.1", "--master-port", port)
            program = (str(folder / "ask.py"), str(engine), str(folder), *words)
            self.launchers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *nodes, *meeting, *options, *program],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=(folder / f"said-{machine}").open("w"),
                    text=True,
                )
            )

    def process_of(self, rank: int) -> int:
        """Return the number of a rank's process."""
        return int((self.folder / str(rank)).read_text())

    def said(self) -> list[str]:
        """Return the lines that ranks said of a fault, or where one broke: torchrun's own have another form."""
        lines = [line for path in self.folder.glob("said-*") for line in path.read_text().splitlines()]
        return [line for line in lines if line.startswith("error: ") or "seekforge/runtime" in line]

    def alive(self) -> list[int]:
        """Return the ranks whose process is there."""
        return [rank for rank in (0, 1) if Path(f"/proc/{self.process_of(rank)}").exists()]

    def end(self) -> None:
        """Kill what is left."""
        for launcher in self.launchers:
            launcher.terminate()  # which ends its ranks
        for launcher in self.launchers:
            launcher.communicate(timeout=60)


@pytest.fixture(scope="session")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_engine(tiny_checkpoint, Parallelism(tp=2), tmp_path_factory)


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    made: list[Launch] = []
    yield made
    for launch in made:
        launch.end()


@pytest.mark.parametrize("machines", [1, 2])
def test_text_is_that_of_one_rank_and_all_end(
    engine: Path, tiny_engines: dict[str, Path], machines: int, tmp_path: Path, launches: list[Launch]
) -> None:
    with LLM(tiny_engines["exact"], num_blocks=9, num_speculative_tokens=1, threads=1) as llm:
        outputs = llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=12, temperature=0))
        expected = str([output.outputs[0].token_ids for output in outputs])
    launch = Launch(engine, tmp_path, machines)
    launches.append(launch)
    told = [launcher.communicate(timeout=240)[0].strip() for launcher in launch.launchers]
    assert [launcher.returncode for launcher in launch.launchers] == [0] * machines, launch.said()
    assert told == [expected, ""][:machines] and not launch.said()
    assert not launch.alive()


@pytest.mark.parametrize(("machines", "victim"), [(1, 1), (2, 1), (1, 0), (2, 0)])
def test_a_killed_rank_ends_all_with_one_line(
    engine: Path, machines: int, victim: int, tmp_path: Path, launches: list[Launch]
) -> None:
    """On one machine torchrun ends the other ranks itself as soon as it looks: here it looks late, so rank 0 speaks."""
    launch = Launch(engine, tmp_path, machines, "again", options=("--monitor-interval", "8"))
    launches.append(launch)
    stdout = launch.launchers[0].stdout
    assert stdout is not None and stdout.readline().startswith("["), launch.said()
    time.sleep(0.3)
    os.kill(launch.process_of(victim), signal.SIGKILL)
    for launcher in launch.launchers:
        launcher.communicate(timeout=60)
    assert all(launcher.returncode for launcher in launch.launchers)
    assert not launch.alive()
    if victim:
        assert len(launch.said()) == 1 and "rank 1 " in launch.said()[0] and " ended" in launch.said()[0]
    else:
        assert not launch.said(), "who would say it is gone; torchrun names it"
