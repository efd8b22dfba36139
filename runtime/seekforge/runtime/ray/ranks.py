"""The ranks of a replica's engine other than its own: started on their bundles, watched, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from seekforge.common.errors import EngineError
from seekforge.runtime.ray.placement import Seat, environments_of, ranks_of
from seekforge.runtime.ray.rank import RankProcess, seat_here

#: Seconds until an actor on a reserved bundle counts as one that does not start.
_STARTING_S: Final = 120.0


class Holder(Protocol):
    """An actor with the process of a rank."""

    async def call(self, name: str, *arguments: Any) -> Any:
        """Call a method of its `RankProcess`."""
        ...

    def kill(self) -> None:
        """End the actor, and its process with it."""
        ...


class ActorHolder:
    """A Ray actor with the process of a rank.

    Args:
        actor: its handle.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def call(self, name: str, *arguments: Any) -> Any:
        """Call a method of its `RankProcess`."""
        return await getattr(self._actor, name).remote(*arguments)

    def kill(self) -> None:
        """End the actor, and its process with it."""
        import ray

        with contextlib.suppress(Exception):  # gone already
            ray.kill(self._actor)


def place_actors() -> tuple[Seat, list[Holder]]:
    """Start an actor on each bundle of this replica's placement group but the first, which is the replica's own.

    Returns:
        where the replica is, and the actors in the order of their bundles.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    if group is None:
        raise EngineError(
            "the replica has no placement group; deploy it by seekforge.runtime.ray.application:build_app"
        )
    kind = ray.remote(RankProcess)
    holders: list[Holder] = []
    for index, bundle in enumerate(group.bundle_specs[1:], 1):
        options = kind.options(
            num_cpus=bundle.get("CPU", 0.0),
            num_gpus=bundle.get("GPU", 0.0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        holders.append(ActorHolder(options.remote()))
    return seat_here(), holders


class Ranks:
    """All ranks of an engine but 0, which the replica's own process starts.

    Args:
        engine: the engine's folder.
        num_ranks: ranks of the engine, 0 among them.
        place: starts the actors that hold them.
    """

    def __init__(
        self, engine: Path, num_ranks: int, place: Callable[[], tuple[Seat, Sequence[Holder]]] = place_actors
    ) -> None:
        self._engine, self._num_ranks, self._place = engine, num_ranks, place
        self._holders: Sequence[Holder] = ()
        self._watches: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self, on_lost: Callable[[str], None]) -> dict[str, str]:
        """Start them; return the variables of rank 0, for which they then wait.

        Args:
            on_lost: called with a line about each rank that ends before `close`.

        Raises:
            EngineError: there are not as many bundles as ranks, or an actor does not start.
        """
        here, self._holders = self._place()
        if len(self._holders) + 1 != self._num_ranks:
            raise EngineError(
                f"the placement group has {len(self._holders) + 1} bundles, the engine has {self._num_ranks} ranks; "
                "leave placement_group_bundles to the application"
            )
        seats = [here, *await self._from_all("seat")]
        environments = environments_of(seats, _free_port(), secrets.token_hex(16))
        ranks = ranks_of(seats)
        process_ids = await self._from_all("start", [(str(self._engine), one) for one in environments[1:]])
        for holder, rank, seat, process_id in zip(self._holders, ranks[1:], seats[1:], process_ids, strict=True):
            name = f"rank {rank} (process {process_id} at {seat.address})"
            self._watches.append(asyncio.create_task(self._watch(holder, name, on_lost)))
        return environments[0]

    async def close(self, patience_s: float = 10.0) -> None:
        """End them: rank 0 has told them to, and those that do not in that time are killed."""
        self._closing = True
        if self._watches:
            await asyncio.wait(self._watches, timeout=patience_s)
        for holder in self._holders:
            holder.kill()
        for watch in self._watches:
            watch.cancel()

    async def _from_all(self, name: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        calls = [
            holder.call(name, *(() if arguments is None else arguments[at])) for at, holder in enumerate(self._holders)
        ]
        try:
            return await asyncio.wait_for(asyncio.gather(*calls), _STARTING_S)
        except Exception as error:  # Ray's, of many kinds
            words = " ".join(str(error).split())[:300] or type(error).__name__
            raise EngineError(f"an actor for a rank of the engine did not start: {words}") from None

    async def _watch(self, holder: Holder, name: str, on_lost: Callable[[str], None]) -> None:
        try:
            how = await holder.call("ended")
        except Exception as error:  # Ray's, of many kinds: the actor or its node is gone
            how = f"is lost with its actor ({type(error).__name__})"
        if not self._closing:
            on_lost(f"{name} {how}")


def _free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.create_server(("", 0)) as one:
        return one.getsockname()[1]
