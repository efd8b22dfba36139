"""Engines whose ranks are on several machines: here two groups of processes that share nothing but localhost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.rank_engines import rank_engine

from seekforge.formats.parallelism import Parallelism
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.backends.ranks.nodes import SECRET

#: The same program for every rank; rank 0 says what it got.
_SCRIPT = """
import sys
from seekforge import LLM, SamplingParams
from seekforge.common.errors import SeekforgeError
try:
    with LLM(sys.argv[1], num_blocks=9, num_speculative_tokens=1, threads=1) as llm:
        while True:
            outputs = llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=12, temperature=0))
            print([output.outputs[0].token_ids for output in outputs], flush=True)
            if len(sys.argv) < 3:
                break
except SeekforgeError as error:
    sys.exit(f"error: {error}")
"""
_LAYOUT = Parallelism(tp=2, pp=2)


@pytest.fixture(scope="session")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_engine(tiny_checkpoint, _LAYOUT, tmp_path_factory)


def started(engine: Path, *words: str, secrets: dict[int, str] | None = None) -> list[subprocess.Popen[str]]:
    """Start four ranks as torchrun starts them on two machines of two."""
    shared = os.environ | {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(random.randrange(20_000, 30_000)),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(engine), *words],
            env=shared
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % 2),
                SECRET: (secrets or {}).get(rank, "known to the ranks of a test"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]


@pytest.mark.slow  # four processes, each of which imports ONNX Runtime and opens its part, and three of another engine
def test_ranks_of_two_machines_give_what_those_of_one_give(engine: Path) -> None:
    with LLM(engine, num_blocks=9, num_speculative_tokens=1, threads=1) as llm:
        outputs = llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=12, temperature=0))
        expected = str([output.outputs[0].token_ids for output in outputs])
    processes = started(engine)
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ended
    assert ended[0][0].strip() == expected and not any(out for out, _ in ended[1:])


@pytest.mark.slow  # as above, several times
@pytest.mark.parametrize(
    ("victim", "number"),
    [(0, signal.SIGKILL), *((rank, number) for rank in (1, 3) for number in (signal.SIGKILL, signal.SIGSTOP))],
)
def test_a_rank_that_is_lost_ends_all_with_one_line(engine: Path, victim: int, number: signal.Signals) -> None:
    """Whichever it is, on whichever machine; one that stands still as well, but for rank 0, which looks at others."""
    processes = started(engine, "again")
    assert processes[0].stdout is not None
    try:
        assert processes[0].stdout.readline().startswith("[")
        time.sleep(0.3)
        processes[victim].send_signal(number)
        for rank, process in enumerate(processes):
            if rank != victim:
                process.wait(60)
        if victim:
            said = processes[0].communicate(timeout=30)[1].strip().splitlines()
            how = "ended" if number == signal.SIGKILL else "stands still"
            assert len(said) == 1 and f"rank {victim} {how}" in said[0], said
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow  # as above
def test_a_rank_that_does_not_know_the_secret_is_not_let_in(engine: Path) -> None:
    processes = started(engine, secrets={3: "a guess of sixteen or more"})
    try:
        _, said = processes[3].communicate(timeout=100)
        assert processes[3].returncode != 0 and "rank 0 (localhost" in said and "knows another" in said
        assert processes[0].poll() is None, "rank 0 waits for the one that does"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
