"""Where ranks are put and what becomes of them, with actors that are none of Ray's."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.parallelism import Parallelism
from seekforge.runtime.backends.ranks.host import launched
from seekforge.runtime.backends.ranks.nodes import SECRET, local_number
from seekforge.runtime.ray.placement import Seat, bundles_of, environments_of, ranks_of
from seekforge.runtime.ray.rank import RankProcess
from seekforge.runtime.ray.ranks import Ranks

HERE, NEAR, FAR = Seat("a", "10.0.0.1"), Seat("a", "10.0.0.1"), Seat("b", "10.0.0.2")


class FakeHolder:
    """An actor that remembers what it was told, and whose process ends when a test says so."""

    def __init__(self, seat: Seat | Exception) -> None:
        self._seat = seat
        self.told: tuple[str, Mapping[str, str]] | None = None
        self.ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.killed = False

    async def call(self, name: str, *arguments: Any) -> Any:
        if name == "seat":
            if isinstance(self._seat, Exception):
                raise self._seat
            return self._seat
        if name == "start":
            engine, environment = arguments
            self.told = (engine, environment)
            return 4000 + int(environment["RANK"])
        assert name == "ended"
        return await self.ending

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize(
    ("ranks", "backend", "number", "gpus"),
    [
        (None, "onnxruntime", 1, 0.0),
        (Parallelism(tp=2, pp=2), "onnxruntime", 4, 0.0),
        (Parallelism(tp=8), "tensorrt", 8, 1.0),
        (None, "tensorrt-rtx", 1, 1.0),
    ],
)
def test_every_rank_has_a_bundle_with_its_cores_and_its_gpu(
    toy_engine: Path, ranks: Parallelism | None, backend: Any, number: int, gpus: float
) -> None:
    manifest: Any = SimpleNamespace(
        ranks=None if ranks is None else SimpleNamespace(parallelism=ranks),
        target=replace(load_manifest(toy_engine).target, backend=backend),
    )
    assert bundles_of(manifest, 2) == [{"CPU": 2.0, "GPU": gpus}] * number


@pytest.mark.parametrize(
    ("nodes", "expected"), [("a", [0]), ("ab", [0, 1]), ("abab", [0, 2, 1, 3]), ("bacab", [0, 2, 4, 3, 1])]
)
def test_ranks_of_a_node_follow_each_other(nodes: str, expected: list[int]) -> None:
    assert ranks_of([Seat(node, "") for node in nodes]) == expected


def test_ranks_on_one_node_share_memory() -> None:
    environments = environments_of([HERE, NEAR], 4001, "s" * 32)
    places = [launched(environment) for environment in environments]
    assert [(one.rank, one.num_ranks, one.across) for one in places if one] == [(0, 2, None), (1, 2, None)]
    assert not any("CUDA_VISIBLE_DEVICES" in one for one in environments), "none is reserved"


def test_ranks_on_several_nodes_meet_at_the_first_and_see_the_gpus_of_theirs() -> None:
    seats = [
        replace(seat, gpus=(gpu,)) for seat, gpu in ((HERE, "3"), (FAR, "0"), (NEAR, "GPU-5"), (FAR, "1"), (NEAR, "7"))
    ]
    environments = environments_of(seats, 4001, "s" * 32)
    for environment, rank, number, gpus in zip(
        environments,
        (0, 3, 1, 4, 2),
        (0, 0, 1, 1, 2),
        ("3,GPU-5,7", "0,1", "3,GPU-5,7", "0,1", "3,GPU-5,7"),
        strict=True,
    ):
        place = launched(environment)
        assert place is not None and place.across is not None
        assert (place.rank, place.num_ranks) == (rank, 5)
        assert (place.across.address, place.across.port, place.across.secret) == ("10.0.0.1", 4001, b"s" * 32)
        assert local_number(rank, environment) == number and environment["CUDA_VISIBLE_DEVICES"] == gpus


def test_bundles_with_different_numbers_of_gpus_are_refused() -> None:
    with pytest.raises(EngineError, match=r"1 at 10\.0\.0\.1, 0 at 10\.0\.0\.2"):
        environments_of([replace(HERE, gpus=("0",)), FAR], 4001, "s" * 32)


def test_ranks_are_started_watched_and_ended(tmp_path: Path) -> None:
    async def main() -> None:
        holders = [FakeHolder(FAR), FakeHolder(NEAR), FakeHolder(FAR)]
        lost: list[str] = []
        ranks = Ranks(tmp_path, 4, lambda: (HERE, holders))
        first = await ranks.start(lost.append)
        told = [one.told for one in holders]
        assert all(one is not None and one[0] == str(tmp_path) for one in told)
        variables = [first, *(one[1] for one in told if one is not None)]
        assert [one["RANK"] for one in variables] == ["0", "2", "1", "3"]
        assert len({one[SECRET] for one in variables}) == 1 and len(first[SECRET]) == 32
        again = Ranks(tmp_path, 1, lambda: (HERE, []))
        assert (await again.start(lost.append))[SECRET] != first[SECRET], "each replica has its own"
        holders[0].ending.set_result("was ended by signal 9")
        holders[1].ending.set_exception(ConnectionError("the node is gone"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert lost == [
            "rank 2 (process 4002 at 10.0.0.2) was ended by signal 9",
            "rank 1 (process 4001 at 10.0.0.1) is lost with its actor (ConnectionError)",
        ]
        closing = asyncio.create_task(ranks.close())
        await asyncio.sleep(0)
        assert not any(one.killed for one in holders), "the last one is still about to end"
        holders[2].ending.set_result("ended with exit code 0")
        await closing
        assert all(one.killed for one in holders) and len(lost) == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("seats", "line"),
    [
        ([FAR], "has 2 bundles, the engine has 3 ranks"),
        ([FAR, RuntimeError("no worker\nstarts")], "did not start: no worker starts"),
    ],
)
def test_ranks_that_cannot_be_started_say_why(seats: Sequence[Seat | Exception], line: str) -> None:
    async def main() -> None:
        ranks = Ranks(Path("engine"), 3, lambda: (HERE, [FakeHolder(seat) for seat in seats]))
        with pytest.raises(EngineError, match=line):
            await ranks.start(lambda line: None)

    asyncio.run(main())


def test_a_rank_that_cannot_open_its_engine_says_why(tmp_path: Path) -> None:
    process = RankProcess()
    process.start(str(tmp_path / "absent"), {"RANK": "1", "WORLD_SIZE": "2"})
    how = process.ended()
    assert how.startswith("ended with exit code 2: ") and "absent" in how


def test_a_rank_whose_copy_of_the_engine_is_damaged_says_so(toy_copy: Path) -> None:
    """Its node may have another copy than the replica's, with the same manifest."""
    file = max(load_manifest(toy_copy).files, key=lambda one: one.bytes)
    content = bytearray((toy_copy / file.path).read_bytes())
    content[-1] ^= 1
    (toy_copy / file.path).write_bytes(content)
    process = RankProcess()
    process.start(str(toy_copy), {"RANK": "1", "WORLD_SIZE": "2"})
    how = process.ended()
    assert how.startswith("ended with exit code 2: ") and file.path in how


def test_a_rank_that_is_killed_is_told_by_its_signal(tmp_path: Path) -> None:
    process = RankProcess()
    os.kill(process.start(str(tmp_path), {}), signal.SIGKILL)
    assert process.ended() == "was ended by signal 9"
