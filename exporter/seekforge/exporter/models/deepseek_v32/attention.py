"""The attention of DeepSeek-V3.2: sparse, in every layer by an indexer of its own."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.shared.layers import rope_half_split
from seekforge.exporter.models.shared.sparse.attention import Rope, SparseAttention


class Attention(SparseAttention):
    """One attention block, whose indexer turns pairs (i, i + R/2), unlike the main attention (spec §3.2, P1)."""

    index_rope: Final[Rope] = staticmethod(rope_half_split)
