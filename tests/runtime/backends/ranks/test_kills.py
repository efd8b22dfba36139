"""Fifty times one of an engine's processes is killed at some moment: one line, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.support.rank_engines import rank_engine

from seekforge.formats.parallelism import Parallelism

#: Starts an engine, says so, and answers requests until it is ended or fails.
_SCRIPT = """
import sys
from seekforge import LLM, SamplingParams
from seekforge.common.errors import SeekforgeError
try:
    with LLM(sys.argv[1], num_blocks=9, num_speculative_tokens=1, threads=1) as llm:
        while True:
            llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=30, temperature=0))
            print("answered", flush=True)
except SeekforgeError as error:
    sys.exit(f"error: {error}")
"""
_TRIALS, _LONGEST_S = 50, 6.0


def _named_memory(processes: Iterable[int]) -> set[Path]:
    """Return the shared memory with a name that processes have: others use the folder too, also while this runs."""
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it ended
            mapped = Path(f"/proc/{process}/maps").read_text().splitlines()
            found |= {Path(line[line.index("/") :]) for line in mapped if " /dev/shm/" in line}
    return found


def _ranks_of(parent: int) -> list[int]:
    ranks = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                ranks.append(int(stat.parent.name))
        except OSError:
            continue
    return ranks


@pytest.mark.slow
@pytest.mark.timeout(3600)  # fifty starts of four processes
def test_killing_any_process_at_any_moment_leaves_nothing(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = rank_engine(tiny_checkpoint, Parallelism(tp=2, pp=2, ep=True), tmp_path_factory)
    draw, named = random.Random(0), set[Path]()
    outcomes = {"rank 0": 0, "another": 0, "before it was one": 0}
    for trial in range(_TRIALS):
        process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(engine)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        if trial % 2:  # while it answers; else while it opens
            process.stdout.readline()
        time.sleep(draw.uniform(0, _LONGEST_S / (1 + trial % 2)))
        ranks = _ranks_of(process.pid)
        named |= _named_memory([process.pid, *ranks])
        victim = draw.choice([process.pid, *ranks])
        os.kill(victim, signal.SIGKILL)
        try:
            _, said = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"trial {trial}: still runs 30 s after the kill of {victim} among {ranks}")
        if victim != process.pid:
            lines = said.strip().splitlines()
            assert len(lines) == 1 and "rank " in lines[0] and "was ended by signal 9" in lines[0], (trial, said)
            outcomes["another"] += 1
        else:
            outcomes["rank 0" if ranks else "before it was one"] += 1
        deadline = time.monotonic() + 20
        left = ranks
        while left and time.monotonic() < deadline:
            left = [rank for rank in left if _alive(rank)]
            time.sleep(0.02)
        assert not left, f"trial {trial}: {left} of {ranks} live after the kill of {victim}"
    assert not [path for path in named if path.exists()], "no shared memory is left"
    assert outcomes["rank 0"] and outcomes["another"], outcomes


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
