"""Which row of a table belongs to which running sequence, for tables that are kept from step to step."""

from __future__ import annotations

from seekforge.runtime.sequence import Sequence


class RowIndex:
    """Hands out rows 0 to `count` − 1. A sequence keeps its row while it runs."""

    def __init__(self, count: int) -> None:
        self._holders: list[Sequence | None] = [None] * count
        self._place_of: dict[int, int] = {}
        self._vacant = list(range(count))

    def find(self, sequence: Sequence) -> int | None:
        """Return the row of a sequence, or None where it has none."""
        return self._place_of.get(sequence.request_id)

    def settle(self, sequence: Sequence) -> tuple[int, Sequence | None]:
        """Give a sequence a row. Those that no longer run lose theirs when none is vacant.

        Returns:
            The row, and whose it was before.
        """
        if not self._vacant:
            for place, holder in enumerate(self._holders):
                if holder is None or holder.state == "running":
                    continue
                if self._place_of.get(holder.request_id) == place:
                    del self._place_of[holder.request_id]
                    self._vacant.append(place)
        place = self._vacant.pop()
        before, self._holders[place] = self._holders[place], sequence
        self._place_of[sequence.request_id] = place
        return place, before
