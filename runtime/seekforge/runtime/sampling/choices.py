"""Text that is one of given texts: which tokens lead there, and within the tokens that are left.

A grammar library takes thousands of choices for a grammar that is too complex, and knows nothing of `max_tokens`: a
long choice would be cut off as if it were free text. Here the texts that are still possible are a range of the sorted
ones, whatever their number, and a token is allowed only if some text can be completed after it.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import numpy as np

from seekforge.common.errors import RequestError
from seekforge.runtime.text.vocabulary import Vocabulary

#: Most bytes of all choices together: what is within takes some seconds to count, of the thread that asks.
MAX_BYTES = 1 << 20
#: Most bytes of the masks that are kept; the others are made again.
_MAX_MASK_BYTES = 64 << 20
#: Bytes of a text whose tokens are counted only to say how many it takes.
_COUNTED = 4096
_NO_TOKENS = "structured_outputs.choice: the vocabulary has no tokens for any of the texts"


class Choices:
    """The choices of any number of requests. Thread-safe: what is kept is only ever added to."""

    def __init__(self, texts: Sequence[str], vocabulary: Vocabulary, ends: Sequence[int], vocab_size: int) -> None:
        """Sort them.

        Args:
            texts: none empty.
            vocabulary: tokens that may be used; the others stand for nothing.
            ends: ends of sequence, allowed where the text is complete.
            vocab_size: the vocabulary size of the model.

        Raises:
            RequestError: they are too long together.
        """
        self._texts = sorted({text.encode() for text in texts})
        total = sum(map(len, self._texts))
        if total > MAX_BYTES:
            raise RequestError(
                f"structured_outputs.choice holds {total:,} bytes, expected at most {MAX_BYTES:,}; use regex or grammar"
            )
        self._ids_of, self._longest = vocabulary.ids_of, vocabulary.longest
        self._ends, self._vocab_size = list(ends), vocab_size
        self._longest_text = max(map(len, self._texts))
        self._masks: dict[bytes, np.ndarray] = {}
        self._needed = functools.cache(self._count_needed)

    def check(self, max_tokens: int) -> None:
        """Refuse what no completion could hold.

        Raises:
            RequestError: not even the shortest choice fits.
        """
        if self._longest_text + 1 <= max_tokens:  # no token stands for less than a byte
            return
        may_fit = [text for text in self._texts if len(text) <= (max_tokens - 1) * self._longest]
        if self._longest and not may_fit:  # only the shortest need be counted, if it is not too long for that
            shortest = min(self._texts, key=len)
            least = self._needed(shortest)[0] if len(shortest) <= _COUNTED else len(shortest)
            if least == np.inf:
                raise RequestError(_NO_TOKENS)
            raise RequestError(
                f"structured_outputs.choice: even the shortest choice has {len(shortest):,} bytes, max_tokens is "
                f"{max_tokens}; raise it to {int(least) + 1} for that one and the end of sequence"
            )
        least = min((self._needed(text)[0] for text in may_fit), default=np.inf)
        if least == np.inf:
            raise RequestError(_NO_TOKENS)
        if least + 1 > max_tokens:
            raise RequestError(
                f"structured_outputs.choice: the shortest choice takes {int(least)} tokens and the end of sequence, "
                f"max_tokens is {max_tokens}; raise it to {int(least) + 1} at least"
            )

    def allowed(self, text: bytes, num_left: int) -> np.ndarray:
        """Return [vocab_size] bool, the tokens that may follow.

        Args:
            text: so far; the beginning of some choice.
            num_left: tokens that may still be generated, this one included.
        """
        low = bisect.bisect_left(self._texts, text)
        high = bisect.bisect_left(self._texts, text + b"\xff", low)
        some, at = self._texts[low:high], len(text)
        ample = self._longest_text - at + 1 <= num_left
        if ample and text in self._masks:
            return self._masks[text]
        mask = np.zeros(self._vocab_size, bool)
        seen: set[bytes] = set()
        for one in some:
            if len(one) - at > (num_left - 1) * self._longest:
                continue
            if len(one) == at:
                mask[self._ends] = True
            needed = None if ample else self._needed(one)
            for end in range(at + 1, min(len(one), at + self._longest) + 1):
                piece = one[at:end]
                if piece in seen or (needed is not None and needed[end] + 2 > num_left):
                    continue
                seen.add(piece)
                ids = self._ids_of.get(piece)
                if ids:
                    mask[list(ids)] = True
        if ample and (len(self._masks) + 1) * self._vocab_size <= _MAX_MASK_BYTES:
            self._masks[text] = mask
        return mask

    def _count_needed(self, text: bytes) -> list[float]:
        """Return the fewest tokens that spell what of a choice follows each of its bytes, [len + 1]."""
        out = [np.inf] * len(text) + [0.0]
        for start in range(len(text) - 1, -1, -1):
            for end in range(start + 1, min(len(text), start + self._longest) + 1):
                if out[end] + 1 < out[start] and text[start:end] in self._ids_of:
                    out[start] = out[end] + 1
        return out


class ChoiceMatcher:
    """The state of one text among its choices."""

    def __init__(self, choices: Choices, vocabulary: Vocabulary, ends: Sequence[int], max_tokens: int) -> None:
        self._choices, self._bytes_of = choices, vocabulary.bytes_of
        self._ends, self._num_left = frozenset(ends), max_tokens
        self._text = b""

    def allowed(self) -> np.ndarray:
        """Return [vocab_size] bool: the tokens that may come next; the end of sequence when the text is complete."""
        return self._choices.allowed(self._text, self._num_left)

    def advance(self, token: int) -> None:
        """Take a token that was allowed."""
        self._num_left -= 1
        if token not in self._ends:
            self._text += self._bytes_of[token]
