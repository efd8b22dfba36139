"""The points of a DeepSeek-V3.2 layer that parity looks at: an indexer's in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from seekforge.exporter.models.family import Taps
from seekforge.exporter.models.shared.sparse import taps

TAPS: Final[Taps] = replace(taps.TAPS, required=taps.TAPS.required | {"index_q"})
