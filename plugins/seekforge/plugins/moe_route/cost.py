"""What the launch of `MoeRoute` moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.plugins.cost.work import Load, Work
from seekforge.plugins.kernels.launch_plan import Launch


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what choosing experts does: logits in, ids and weights out."""
    tokens, experts, programs = bound["T"], bound["E"], math.prod(launch.grid)
    return Work(
        read_bytes=4 * experts * (tokens + 1),
        written_bytes=8 * tokens * bound["top_k"],
        loaded_bytes=4 * experts * (tokens + programs),
        programs=programs,
    )
