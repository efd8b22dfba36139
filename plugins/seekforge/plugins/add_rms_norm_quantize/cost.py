"""What the launch of `AddRmsNormQuantize` moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.plugins.cost.work import Load, Work
from seekforge.plugins.kernels.launch_plan import Launch


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what norming and quantizing all rows does."""
    rows, width = math.prod(bound["*lead"]), bound["H"]
    values = 2 * rows * (width + bound["R"])
    return Work(
        read_bytes=values + 4 * width,
        written_bytes=rows * (2 * 2 * width + width + 4 * (width // 128)),
        loaded_bytes=values + 4 * rows * width,
        programs=math.prod(launch.grid),
    )
