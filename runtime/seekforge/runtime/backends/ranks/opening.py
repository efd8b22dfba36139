"""Opens a rank: of a CPU engine, or of a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from seekforge.common.paths import real_path
from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.runtime.backends.base import GraphMetrics, OnLoad
from seekforge.runtime.backends.ranks.collectives import Collectives
from seekforge.runtime.backends.ranks.same_check import is_asked_for


class OpenRank(Protocol):
    """What a process does as a rank."""

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches."""
        ...

    def run(
        self, inputs: StepInputs, outputs: Collection[str], graph: str = MODEL, parts: int = 1
    ) -> dict[str, np.ndarray]:
        """Run this rank's part of a step; on rank 0 its results are those of all."""
        ...

    def cache(self, name: str) -> np.ndarray | None:
        """Return a copy of one layer's cache; None where its stage is another."""
        ...

    def check_update(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Refuse new weights that do not belong to the model, or not together."""
        ...

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take this rank's part of new weights, which were checked."""
        ...

    def graph_metrics(self) -> GraphMetrics:
        """Return what became of CUDA graphs on this rank."""
        ...

    def abort(self) -> None:
        """End what waits for a rank that is lost. Called from another thread."""
        ...

    def close(self) -> None:
        """Give back everything."""
        ...


def settings_of(manifest: Manifest, *, threads: int, checkpoint: Path | None) -> dict[str, Any]:
    """Return, as JSON has it, what all ranks of an engine have to know to open their parts.

    Args:
        manifest: the manifest of the engine.
        threads: CPU threads of each rank.
        checkpoint: where the weights are, of an engine that holds none; None: where they were at build.

    Raises:
        EnvironmentFault, EngineError: a library is missing or does not start.
    """
    assert manifest.ranks is not None
    parallelism, groups = manifest.ranks.parallelism, []
    if manifest.target.backend != "onnxruntime" and parallelism.tp > 1:
        from seekforge.runtime.backends.tensorrt.nccl import unique_id

        groups = [unique_id().hex() for _ in range(parallelism.pp)]
    where = None if checkpoint is None else str(real_path(checkpoint))
    return {"threads": threads, "checkpoint": where, "groups": groups, "checked": is_asked_for()}


def open_rank(
    folder: Path,
    manifest: Manifest,
    number: int,
    collectives: Collectives,
    settings: Mapping[str, Any],
    progress: OnLoad | None = None,
    lost: Callable[[], None] = lambda: None,
) -> OpenRank:
    """Open one rank.

    Args:
        folder, manifest: the engine.
        number: the rank.
        collectives: what it has of the others.
        settings: what `settings_of` says, the same on all ranks.
        progress: called while weights are loaded.
        lost: raises when a rank is lost.

    Raises:
        EngineError, EnvironmentFault: it cannot be opened here.
    """
    if manifest.target.backend == "onnxruntime":
        from seekforge.runtime.backends.ranks.rank import Rank  # brings ONNX Runtime

        return Rank(folder, manifest, number, collectives, settings["threads"], checked=settings["checked"])
    from seekforge.runtime.backends.ranks.device_rank import DeviceRank

    groups: Sequence[bytes] = [bytes.fromhex(one) for one in settings["groups"]]
    where = settings["checkpoint"]
    checkpoint = None if where is None else Path(where)
    return DeviceRank(
        folder,
        manifest,
        number,
        collectives,
        groups=groups,
        checkpoint=checkpoint,
        progress=progress,
        checked=settings["checked"],
        lost=lost,
    )
