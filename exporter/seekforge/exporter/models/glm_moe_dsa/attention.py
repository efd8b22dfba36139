"""The attention of GLM-5: sparse, and in GLM-5.2 by one indexer for several layers."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.shared.layers import rope_interleaved
from seekforge.exporter.models.shared.sparse.attention import Rope, SparseAttention


class Attention(SparseAttention):
    """One attention block, whose indexer turns pairs (2i, 2i+1) as the main attention does."""

    index_rope: Final[Rope] = staticmethod(rope_interleaved)
