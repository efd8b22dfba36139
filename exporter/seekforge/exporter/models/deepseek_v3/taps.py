"""The points of a DeepSeek-V3 layer that parity looks at: those of DeepSeek-V3.2 without the indexer's."""

from __future__ import annotations

import dataclasses
from typing import Final

from seekforge.exporter.models.deepseek_v32.taps import TAPS as _V32
from seekforge.exporter.models.family import Taps

_INDEXER: Final = ("index_k_norm", "index_k", "wq_b", "index_q", "index_w")

TAPS: Final[Taps] = dataclasses.replace(
    _V32,
    attention=tuple(point for point in _V32.attention if point not in _INDEXER),
    linears={module: points for module, points in _V32.linears.items() if points[1] not in _INDEXER},
    norm="",
    per_head=tuple(point for point in _V32.per_head if point not in _INDEXER),
    required=_V32.required - set(_INDEXER),
)
