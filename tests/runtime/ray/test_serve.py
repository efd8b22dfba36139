"""Replicas under a local Ray, one of which is killed under load, or loses a rank on another node."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.rank_engines import rank_engine
from tests.support.ray_served import ABSENT, ENGINE, PYTHON, RANK, check_a_killed_replica, serving, variables_of
from tests.support.replicas import completion, expected_texts, wait_until

from seekforge.formats.parallelism import Parallelism

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=ABSENT)]
PROMPTS = [[5 + i, 9, 20 + 3 * i, 7] for i in range(8)]
MODEL = "toy"


def test_a_replica_that_is_killed_under_load_loses_what_was_on_it(toy_engine: Path, tmp_path: Path) -> None:
    texts = expected_texts(toy_engine, PROMPTS)
    with serving(toy_engine, MODEL, tmp_path, "--num-replicas", "2") as served:
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert completion(served.url, MODEL, prompt) == text

        check_a_killed_replica(served, MODEL, PROMPTS, texts)


@pytest.mark.parametrize(
    ("nodes", "local", "number", "said"),
    [
        ((2,), "2", signal.SIGKILL, "was ended by signal 9"),
        ((1, 1), "1", signal.SIGKILL, "was ended by signal 9"),
        ((1, 1), "1", signal.SIGSTOP, "rank 1 stands still"),
    ],
)
def test_ranks_are_on_bundles_and_one_that_is_lost_ends_the_replica(
    nodes: Sequence[int],
    local: str,
    number: signal.Signals,
    said: str,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    """On one node, where they share memory, and on two, where they meet over TCP."""
    engine = rank_engine(tiny_checkpoint, Parallelism(tp=2), tmp_path_factory)
    prompts, max_tokens = PROMPTS[:2], 8
    texts = expected_texts(engine, prompts, max_tokens)
    with serving(engine, MODEL, tmp_path, nodes=nodes) as served:

        def answers() -> list[str]:
            return [completion(served.url, MODEL, prompt, max_tokens) for prompt in prompts]

        assert answers() == texts
        (process,), (rank,) = served.processes(ENGINE), served.processes(RANK)
        variables = {one: variables_of(one) for one in (process, rank)}
        assert [variables[one]["RANK"] for one in (process, rank)] == ["0", "1"]
        assert all(one["LOCAL_WORLD_SIZE"] == local and one["WORLD_SIZE"] == "2" for one in variables.values())
        log = Path(f"/proc/{process}/fd/2").readlink()  # the replica's
        os.kill(rank, number)
        wait_until(lambda: not {process, rank} & {*served.processes(ENGINE), *served.processes(RANK)}, 30)

        def serves_again() -> bool:
            try:
                return answers() == texts
            except OSError:  # until Ray has noticed, or while the next replica loads
                return False

        wait_until(serves_again, 120)
        assert len(served.processes(ENGINE)) == len(served.processes(RANK)) == 1
        ends = [line for line in log.read_text(errors="replace").splitlines() if "the replica ends" in line]
        assert len(ends) == 1 and said in ends[0]
        assert number == signal.SIGSTOP or f"rank 1 (process {rank} at " in ends[0]
