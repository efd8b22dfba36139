"""Text of a completion that comes in pieces, and is held back until it is certain what it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from seekforge.runtime.chat.scanner import Span

#: A text is looked at in pieces of at most so many characters.
CHUNK: Final = 4096
#: Space between tags.
SPACE: Final = " \t\r\n"


class HeldText(ABC):
    """What all scanners do with the text that they are given."""

    def __init__(self) -> None:
        self._held = ""
        self._final = False

    def push(self, piece: str) -> Iterator[Span]:
        """Take a piece of text and yield what is certain."""
        for start in range(0, len(piece), CHUNK):
            self._held += piece[start : start + CHUNK]
            yield from self._scan()

    @abstractmethod
    def _scan(self) -> Iterator[Span]:
        """Yield what is certain of the held text, and take it."""

    def _take(self, count: int) -> str:
        """Return the first characters of the held text, which holds them no more."""
        taken, self._held = self._held[:count], self._held[count:]
        return taken


def begun(text: str, tag: str) -> int:
    """Return how many last characters of `text` are the beginning of a tag, and not all of it."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
