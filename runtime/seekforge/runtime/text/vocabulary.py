"""The bytes of all tokens, to find those that begin with something or contain it."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

#: Stands between tokens; no UTF-8 text holds it.
_BORDER = b"\xff"


class Vocabulary:
    """What each token of a vocabulary stands for.

    Attributes:
        bytes_of: token id -> its bytes; none for ids without a token.
        longest: most bytes of one token.
    """

    def __init__(self, bytes_of: Sequence[bytes]) -> None:
        self.bytes_of = list(bytes_of)
        self.longest = max(map(len, self.bytes_of), default=0)
        order = sorted(range(len(self.bytes_of)), key=self.bytes_of.__getitem__)
        self._order = np.array(order, np.int64)
        self._sorted = [self.bytes_of[token] for token in order]

    def starting(self, prefix: bytes) -> np.ndarray:
        """Return the ids of the tokens that begin with `prefix`, not empty."""
        low = bisect.bisect_left(self._sorted, prefix)
        # of all bytes none follows 0xff, so this comes after whatever begins with the prefix
        high = bisect.bisect_left(self._sorted, prefix + b"\xff" * (self.longest + 1), low)
        return self._order[low:high]

    def containing(self, text: bytes) -> np.ndarray:
        """Return the ids of the tokens that contain `text`, which is UTF-8 and not empty."""
        blob, starts = self._blob
        at = [match.start() for match in re.finditer(re.escape(text), blob)]
        return np.unique(np.searchsorted(starts, at, side="right") - 1)

    @cached_property
    def _blob(self) -> tuple[bytes, np.ndarray]:
        """All bytes one after the other, and where each token begins."""
        sizes = [len(one) + len(_BORDER) for one in self.bytes_of]
        return _BORDER.join(self.bytes_of), np.cumsum([0, *sizes[:-1]])

    @cached_property
    def ids_of(self) -> dict[bytes, tuple[int, ...]]:
        """Bytes -> the tokens that stand for exactly these; ids without a token are left out."""
        out: dict[bytes, tuple[int, ...]] = {}
        for token, text in enumerate(self.bytes_of):
            if text:
                out[text] = (*out.get(text, ()), token)
        return out
