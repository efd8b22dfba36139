"""What a backend is to the engine: it holds the caches and runs one step of one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.step_runner import StepRunner

if TYPE_CHECKING:
    from seekforge.formats.loader import LoadProgress  # what loads brings it; CPU engines start without


@dataclass(frozen=True)
class GraphMetrics:
    """CUDA graphs of a backend since it was opened.

    Attributes:
        captured: steps that were captured.
        launched: steps that were run by a captured graph.
        failed: captures that failed or that the library refused; their steps are enqueued, and never tried again.
    """

    captured: int = 0
    launched: int = 0
    failed: int = 0


class Backend(StepRunner, Protocol):
    """An opened engine, which runs steps; caches are updated in place."""

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Swap weights; caches stay as they are. Called between steps.

        Args:
            tensors: checkpoint tensor name -> new value.

        Raises:
            EngineError: see `LLM.update_weights`; nothing is changed.
        """
        ...

    def graph_metrics(self) -> GraphMetrics:
        """Return what became of CUDA graphs; zeros where there are none."""
        ...

    def close(self) -> None:
        """Give back sessions and caches."""
        ...


@runtime_checkable
class OfProcesses(Protocol):
    """A backend of several processes, which can be lost."""

    @property
    def fault(self) -> str | None:
        """Why no step can be run any more; None: one can."""
        ...


def fault_of(backend: Backend) -> str | None:
    """Return why no step can be run any more by a backend that lost a process; None: one can."""
    return backend.fault if isinstance(backend, OfProcesses) else None


#: Told while weights are loaded.
OnLoad = Callable[["LoadProgress"], None]


class BackendFactory(Protocol):
    """How a backend comes to be: the class of one."""

    def __call__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        checkpoint: Path | None = None,
        progress: OnLoad | None = None,
    ) -> Backend:
        """Open the engine in `folder`.

        Args:
            folder: engine folder, its files verified.
            manifest: the manifest of that folder.
            threads: CPU threads for one operator; None lets the library choose.
            checkpoint: where the weights are, of an engine that holds none; None takes where they were at build.
            progress: called while weights are read from a checkpoint.

        Raises:
            EngineError: a graph cannot be loaded or takes or gives something else than the manifest says.
        """
        ...
