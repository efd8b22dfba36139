"""What one iteration runs: rows of tokens in at most two rectangles, a prefill group and a decode group."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import NamedTuple

from seekforge.runtime.sequence import Sequence


class Row(NamedTuple):
    """The tokens [start, stop) of one sequence, run in one step.

    Attributes:
        samples: the row reaches the last known token, so its logits choose what follows.
        num_drafts: how many of its last tokens are guesses.
    """

    sequence: Sequence
    start: int
    stop: int
    samples: bool
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    def cut(self, width: int) -> Row:
        """Return the row with so many tokens; drafts are dropped."""
        return self._replace(stop=self.start + width, num_drafts=width - 1)


class Iteration(NamedTuple):
    """What to run now; either group may be empty. Each group is one call of the model."""

    prefill: tuple[Row, ...]
    decode: tuple[Row, ...]

    @property
    def groups(self) -> Iterator[tuple[Row, ...]]:
        """The groups that are not empty."""
        return (group for group in (self.prefill, self.decode) if group)


def verify_width(lengths: Rows[int], most: int) -> int:
    """Return the widest rectangle, up to `most`, of which rows cut to its width fill at least three quarters.

    Args:
        lengths: tokens that each row could have, at least 1.
        most: the largest width, at least 1.
    """
    width = min(max(lengths), most)
    while 4 * sum(min(length, width) for length in lengths) < 3 * width * len(lengths):
        width -= 1
    return width
