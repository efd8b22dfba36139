"""From tokens to the text of one completion: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from seekforge.runtime.tokenizer import Detokenizer, Tokenizer


class TextStream:
    """Collects the text of one completion and looks for stop strings, also across token borders.

    Attributes:
        text: so far. It ends before the stop string that was found, or with it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        """Start with no text.

        Args:
            tokenizer: of the model.
            stop: strings that end the text.
            include_stop: keep the one that was found.
            min_tokens: stop strings that are complete before this many tokens do not count.
        """
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_taken = 0
        self._stopped = False
        self.text = ""

    def push(self, token: int) -> bool:
        """Take a token; returns whether it completes a stop string. Nothing may follow then."""
        self._num_tokens += 1
        return self._add(self._detokenizer.push(token))

    def take(self, *, final: bool = False) -> str:
        """Return the text that is new since the last call and certain to stay.

        Args:
            final: no token follows: nothing is held back, and half a character becomes U+FFFD.
        """
        if final and not self._stopped:
            self._add(self._detokenizer.finish())
        end = len(self.text) if final or self._stopped else len(self.text) - self._held_back()
        new = self.text[self._num_taken : end]
        self._num_taken = max(self._num_taken, end)
        return new

    def _add(self, new: str) -> bool:
        start = max(len(self.text) - self._longest + 1, 0)
        self.text += new
        if not self._stop or not new or self._num_tokens < self._min_tokens:
            return False
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
        if not found:
            return False
        at, stop = min(found)
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        self._stopped = True
        return True

    def _held_back(self) -> int:
        """Return how many last characters could be the beginning of a stop string."""
        tail = self.text[self._num_taken :][-(self._longest - 1) :] if self._longest > 1 else ""
        return max(
            (len(tail) - at for at in range(len(tail)) if any(stop.startswith(tail[at:]) for stop in self._stop)),
            default=0,
        )
