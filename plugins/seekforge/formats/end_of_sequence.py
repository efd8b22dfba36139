"""The ends of sequence as config.json, generation_config.json and manifest.json have them: one id, or several."""

from __future__ import annotations

from collections.abc import Sequence


def end_ids(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return all ids of what such a file has."""
    return (value,) if isinstance(value, int) else tuple(value)


def as_written(ids: Sequence[int]) -> int | tuple[int, ...]:
    """Return ids as such a file has them: one alone is no list."""
    return ids[0] if len(ids) == 1 else tuple(ids)
