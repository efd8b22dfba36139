"""Where ranks of one engine are: what each reserves, which rank sits where, and how each learns of the others.

Pure values: nothing here knows Ray. The rest is what a launcher such as torchrun does (docs/multi-gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import Manifest
from seekforge.runtime.backends.ranks.nodes import SECRET


@dataclass(frozen=True)
class Seat:
    """Where one bundle of a placement group lies.

    Attributes:
        node: the id of its node; ranks of one node share memory.
        address: the address of the node.
        gpus: the GPUs that are reserved there, by the names that CUDA_VISIBLE_DEVICES takes.
    """

    node: str
    address: str
    gpus: tuple[str, ...] = ()


def bundles_of(manifest: Manifest, threads: int) -> list[dict[str, float]]:
    """Return what Ray reserves for a replica: a bundle for each rank, with its cores and its GPU.

    Args:
        manifest: the engine's.
        threads: CPU threads of each rank.
    """
    ranks = 1 if manifest.ranks is None else manifest.ranks.parallelism.num_ranks
    on_gpus = manifest.target.backend != "onnxruntime" or manifest.target.provider is not None
    return [{"CPU": float(threads), "GPU": 1.0 if on_gpus else 0.0} for _ in range(ranks)]


def ranks_of(seats: Sequence[Seat]) -> list[int]:
    """Return the rank of each seat: 0 for the first one, and those of a node one after the other.

    Args:
        seats: where the bundles lie; the first one is the replica's.
    """
    nodes = list(dict.fromkeys(seat.node for seat in seats))
    order = sorted(range(len(seats)), key=lambda at: nodes.index(seats[at].node))
    ranks = [0] * len(seats)
    for rank, at in enumerate(order):
        ranks[at] = rank
    return ranks


def environments_of(seats: Sequence[Seat], port: int, secret: str) -> list[dict[str, str]]:
    """Return the variables of the process at each seat, in the order of the seats.

    Args:
        seats: where the bundles lie; the first one is the replica's.
        port: a free port at the first seat's node, at which rank 0 will listen where there are several nodes.
        secret: what all ranks know then.

    Raises:
        EngineError: some ranks have GPUs and others none.
    """
    if len({len(seat.gpus) for seat in seats}) > 1:
        counts = ", ".join(f"{len(seat.gpus)} at {seat.address}" for seat in seats)
        raise EngineError(f"bundles of one engine have different numbers of GPUs ({counts}); give each as many")
    ranks = ranks_of(seats)
    by_rank = sorted(zip(ranks, seats, strict=True), key=lambda one: one[0])
    environments = []
    for rank, seat in zip(ranks, seats, strict=True):
        neighbours = [(other, its) for other, its in by_rank if its.node == seat.node]
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(seats)),
            "LOCAL_RANK": str([other for other, _ in neighbours].index(rank)),
            "LOCAL_WORLD_SIZE": str(len(neighbours)),
            "MASTER_ADDR": seats[0].address,
            "MASTER_PORT": str(port - 1),  # rank 0 listens one above
            SECRET: secret,
        }
        gpus = [gpu for _, its in neighbours for gpu in its.gpus]
        if gpus:  # all of the node's ranks: the number among them is that of the GPU
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        environments.append(environment)
    return environments
