"""The operations of a layer of GLM-5 (see `models.shared.layer_operations`)."""

from seekforge.exporter.models.shared.sparse.operations import (
    before_cache,
    behind_cache,
    cached,
    key_scores,
    write_cache,
)

__all__ = ["before_cache", "behind_cache", "cached", "key_scores", "write_cache"]
