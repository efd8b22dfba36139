"""Which prefixes an engine holds, as routers of several engines follow it: full blocks that came, and that went.

A router looks for the engine that computed the longest beginning of a prompt. It knows blocks by numbers, each with the
number of the block before it. What else the contents of a cache depend on (weights, speculation, the token behind a
block) is not told: two blocks that differ in nothing else are one block to the router, which goes when the last of them
does.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

#: Bytes of a block's number, of which the last bit is left out: it is positive where numbers are signed.
_NUMBER_BYTES = 8


class BlockChange(NamedTuple):
    """A block that a prompt finds from now on, or finds no more.

    Attributes:
        block: its number: stands for its tokens and all before them, in every engine alike.
        parent: the number of the block before it; None for the first of a prompt, and where it went.
        token_ids: its tokens; None where it went.
    """

    block: int
    parent: int | None = None
    token_ids: tuple[int, ...] | None = None


class BlockChanges:
    """Gathers what a cache publishes and forgets, until it is taken."""

    def __init__(self) -> None:
        self._changes: list[BlockChange] = []
        self._number_of: dict[bytes, int] = {}
        self._holders: dict[int, int] = {}  # number -> digests that stand for it

    def published(self, digest: bytes, parent: bytes | None, tokens: Sequence[int]) -> None:
        """Note a block that can be found under `digest`, behind the block of `parent`; None: it is the first.

        One behind a block that is not there any more is left out: no prompt gets as far.
        """
        before = None if parent is None else self._number_of.get(parent)
        if parent is not None and before is None:
            return
        number = block_number(before, tokens)
        self._number_of[digest] = number
        holders = self._holders.get(number, 0)
        self._holders[number] = holders + 1
        if not holders:
            self._changes.append(BlockChange(number, before, tuple(tokens)))

    def forgotten(self, digest: bytes) -> None:
        """Note that `digest` finds no block any more."""
        number = self._number_of.pop(digest, None)
        if number is None:
            return
        self._holders[number] -= 1
        if not self._holders[number]:
            del self._holders[number]
            self._changes.append(BlockChange(number))

    def take(self) -> list[BlockChange]:
        """Return what changed since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes


def block_number(parent: int | None, tokens: Sequence[int]) -> int:
    """Return the number of a full block: of its tokens, behind the block `parent`."""
    before = b"" if parent is None else parent.to_bytes(_NUMBER_BYTES, "little")
    made = hashlib.blake2b(array("q", tokens).tobytes(), key=before, digest_size=_NUMBER_BYTES)
    return int.from_bytes(made.digest(), "little") >> 1
