"""How ranks work together: four calls. Whoever runs graphs of several ranks knows no more of the others than these.

`shared_memory.SharedMemory` is the one for ranks of a machine, `network.Network` the one for those of several. What
goes between GPUs is inside of plans.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from seekforge.runtime.backends.ranks.message import Message


class Collectives(Protocol):
    """What one rank has of the others. All ranks make the same calls in the same order."""

    def broadcast(self, message: Message | None = None) -> Message:
        """Give every rank what rank 0 passes, which is a step or a decision; the others pass nothing."""
        ...

    def sum(self, part: np.ndarray) -> np.ndarray:
        """Return the sum of what the ranks of a pipeline stage pass, added in the order of ranks: bit for bit the same
        on all of them, and at each time."""
        ...

    def send(self, message: Message | None, *, source: int, target: int) -> Message:
        """Give rank `target` what rank `source` passes. Called by these two; returns the message on both."""
        ...

    def close(self) -> None:
        """Give back what is shared."""
        ...
