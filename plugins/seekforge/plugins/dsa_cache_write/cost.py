"""What the launch of `DsaCacheWrite` moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seekforge.formats.paged_cache import index_row_bytes, latent_row_bytes
from seekforge.plugins.cost.work import Load, Work
from seekforge.plugins.kernels.launch_plan import Launch


def work(launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
    """Return what writing a latent, a rotary key and an indexer key of each token does."""
    tokens, c, r, d = (bound["B"] * bound["Q"], bound["C"], bound["R"], bound["D"])
    read = tokens * (2 * (c + r + d) + 8)
    record = latent_row_bytes(c, r, bound["kv_format"]) + index_row_bytes(d, bound["index_format"])
    return Work(read_bytes=read, written_bytes=tokens * record, loaded_bytes=read, programs=math.prod(launch.grid))
