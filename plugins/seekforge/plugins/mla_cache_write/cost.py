"""What the launch of `MlaCacheWrite` moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.formats.paged_cache import latent_row_bytes
from seekforge.plugins.cost.work import Load, Work
from seekforge.plugins.kernels.launch_plan import Launch


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what writing a latent and a rotary key of each token does."""
    tokens, c, r = (bound["B"] * bound["Q"], bound["C"], bound["R"])
    read = tokens * (2 * (c + r) + 8)
    written = tokens * latent_row_bytes(c, r, bound["kv_format"])
    return Work(read_bytes=read, written_bytes=written, loaded_bytes=read, programs=math.prod(launch.grid))
