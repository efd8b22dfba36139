"""From tokens to the text of one completion: whole characters only, and nothing of a stop string.

The bytes of tokens are joined by `runtime.text.tokenizer.Detokenizer` and not by `tokenizers.decoders.DecodeStream`.
That gives the same text, with special tokens and without, but cannot be told that a text ends: of 300 texts of 100
random tokens it lost the end of 50, half a character that `decode` shows as U+FFFD. It takes 1.0 µs for a token, this
0.6 (tokenizers 0.23); and the bytes of single tokens are needed anyway, for log probabilities and grammars.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence

from seekforge.runtime.text.matching import ROOT, Automaton
from seekforge.runtime.text.tokenizer import Detokenizer, Tokenizer

#: Of the last few sets of stop strings, which all completions of a request have in common.
_automaton = functools.lru_cache(maxsize=8)(Automaton)


class _Search:
    """Looks for stop strings in one way of writing the text.

    Attributes:
        sizes: for each stop string, how many characters it takes from the visible text.
    """

    def __init__(self, stop: Sequence[str], hidden: re.Pattern[str] | None) -> None:
        """Start at the beginning of a text.

        Args:
            stop: what to look for.
            hidden: what stands in the text that is searched and not in the visible one.
        """
        self._automaton = _automaton(tuple(stop))
        self._node = ROOT
        self.sizes = [len(text if hidden is None else hidden.sub("", text)) for text in stop]

    @property
    def held_back(self) -> int:
        """How many last characters could be the beginning of a stop string, at most."""
        return self._automaton.begun[self._node]

    def read(self, new: str, *, counts: bool) -> tuple[int, int] | None:
        """Take what the text gained, up to the end of the first stop string; of those that end there the longest.

        Args:
            new: the new characters.
            counts: whether a stop string that ends in them counts.

        Returns:
            (its end in `new`, its number), or None.
        """
        automaton, node = self._automaton, self._node
        for at, symbol in enumerate(new, 1):
            node = automaton.step(node, symbol)
            number = automaton.found[node]
            if number >= 0 and counts:
                return at, number
        self._node = node
        return None


class TextStream:
    """Collects the text of one completion and looks for stop strings, also across token borders.

    A stop string that is or holds the text of a special token is found where that token is generated, whether or not
    special tokens are part of the text.

    Attributes:
        text: so far. It ends before the stop string that was found, or with it.
        stop_reason: the stop string that was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        stop_ids: Collection[int] = (),
    ) -> None:
        """Start with no text.

        Args:
            tokenizer: the tokenizer of the model.
            stop: strings that end the text.
            include_stop: keep what ended it, string or token.
            min_tokens: stop strings that are complete with one of this many first tokens do not count.
            skip_special_tokens: leave special tokens out of the text.
            stop_ids: tokens that end the text.
        """
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._left_out = frozenset() if include_stop else frozenset(stop_ids)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_taken = 0
        self._search = _Search(self._stop, None) if self._stop else None
        # The second search reads the text with special tokens written out, for what holds one.
        named = tokenizer.special_texts if self._stop and skip_special_tokens else None
        self._named = tuple(text for text in self._stop if named and named.search(text))
        self._written = Detokenizer(tokenizer, skip_special_tokens=False) if self._named else None
        self._written_search = _Search(self._named, named) if self._named else None
        self.stop_reason: str | None = None
        self.text = ""

    def push(self, token: int) -> bool:
        """Take a token; returns whether it completes a stop string. Nothing may follow then."""
        self._num_tokens += 1
        new = "" if token in self._left_out else self._detokenizer.push(token)
        if self._search is None:
            self.text += new
            return False
        return self._add(new, self._written.push(token) if self._written is not None else "")

    def take(self, *, final: bool = False) -> str:
        """Return the text that is new since the last call and certain to stay.

        Args:
            final: no token follows: nothing is held back, and half a character becomes U+FFFD.
        """
        if final and self.stop_reason is None:
            self._add(self._detokenizer.finish(), "")
        end = len(self.text) if final or self.stop_reason is not None else len(self.text) - self._held_back()
        new = self.text[self._num_taken : end]
        self._num_taken = max(self._num_taken, end)
        return new

    def _add(self, new: str, written: str) -> bool:
        before = len(self.text)
        self.text += new
        if self._search is None:
            return False
        counts = self._num_tokens > self._min_tokens
        match = self._search.read(new, counts=counts) if new else None
        if match is not None:
            at, number = match
            return self._finish(before + at - self._search.sizes[number], self._stop[number])
        if self._written_search is not None:
            match = self._written_search.read(written, counts=counts)
            if match is not None:
                at, number = match
                # what follows the stop string in this piece is ordinary text, and stands at the end of `new` too
                end = len(self.text) - min(len(written) - at, len(new))
                start = end - self._written_search.sizes[number]
                return self._finish(max(start, self._num_taken), self._named[number])
        return False

    def _finish(self, start: int, stop: str) -> bool:
        """End the text where a stop string begins, or behind it."""
        self.text = self.text[:start] + (stop if self._include_stop else "")
        self.stop_reason = stop
        return True

    def _held_back(self) -> int:
        """Return how many last characters could be the beginning of a stop string."""
        held = self._search.held_back if self._search is not None else 0
        if self._written_search is not None:
            held = max(held, self._written_search.held_back)
        return min(held, len(self.text) - self._num_taken)
