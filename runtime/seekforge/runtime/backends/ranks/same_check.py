"""The debug mode of ranks: what has to be the same on all ranks of a stage is compared by its digest, step by step.

Ranks of a stage work with the same sums and the same choices, and nothing else tells when they do not: text gets worse.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from seekforge.common.errors import EngineError
from seekforge.formats.parallelism import Coordinates, Parallelism
from seekforge.runtime.backends.ranks.collectives import Collectives

#: The variable that turns it on, with any text but an empty one or 0.
VARIABLE = "SEEKFORGE_CHECK_RANKS"


def is_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment asks for the checks."""
    return environment.get(VARIABLE, "0") not in ("", "0")


class SameCheck:
    """Compares values over the ranks of a stage.

    Args:
        collectives: the rank's.
        parallelism: how many ranks there are.
        number: the rank.
    """

    def __init__(self, collectives: Collectives, parallelism: Parallelism, number: int) -> None:
        self._collectives, self._tp = collectives, parallelism.tp
        self._place: Coordinates = parallelism.coordinates(number)
        self._first = number - self._place.tp_rank
        self.num_checks = 0

    def require(self, what: str, value: np.ndarray) -> None:
        """Refuse to go on where the ranks of the stage differ. All of them call it, with the same name.

        Args:
            what: the name of the value, for the message.
            value: the value on this rank.

        Raises:
            EngineError: on every rank, naming the first whose value is not that of most.
        """
        if self._tp == 1:
            return
        self.num_checks += 1
        digests = np.zeros(self._tp, np.int64)
        digests[self._place.tp_rank] = _digest(value)
        told = self._collectives.sum(digests).tolist()
        if len(set(told)) == 1:
            return
        usual = max(told, key=told.count)  # the first of those that are as frequent
        odd = next(place for place, one in enumerate(told) if one != usual)
        raise EngineError(
            f"rank {self._first + odd} has another {what} than rank {self._first + told.index(usual)} "
            f"(check {self.num_checks} of stage {self._place.pp_rank}): its weights, its caches or its device are "
            "damaged; start the engine again"
        )


def _digest(value: np.ndarray) -> int:
    """Return 63 bits that say what an array is, its shape and type included."""
    made = hashlib.blake2b(f"{value.dtype}{value.shape}".encode(), digest_size=8)
    made.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return int.from_bytes(made.digest(), "little") >> 1
