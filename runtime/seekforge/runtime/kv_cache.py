"""Which cache blocks a sequence owns. Pure Python: no numpy, no device.

Every layer's caches are one pool of blocks of 64 slots, and a block number means the same block in all of
them, so one table per sequence serves the whole model. Block 0 is scrap: kernels send padded rows there,
and it is never handed out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

SCRAP_BLOCK = 0


class BlockAccountingError(RuntimeError):
    """Blocks were freed twice, shared while free, or taken when none was left: a bug of ours."""


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold `num_tokens` tokens; the last may be part full."""
    return -(-num_tokens // block_size)


def slots_for(blocks: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """Return the cache slot of each position in [start, stop).

    Args:
        blocks: the sequence's block table; it must reach position `stop - 1`.
        start, stop: positions in the sequence.
        block_size: slots in a block. slot = block_id * block_size + offset.
    """
    assert stop <= len(blocks) * block_size, f"position {stop - 1} is beyond a table of {len(blocks)} blocks"
    slots: list[int] = []
    position = start
    while position < stop:
        index, offset = divmod(position, block_size)
        take = min(stop - position, block_size - offset)
        first = blocks[index] * block_size + offset
        slots.extend(range(first, first + take))
        position += take
    return slots


class BlockPool:
    """Hands out blocks 1 … num_blocks − 1 and counts their owners.

    A block has as many owners as tables name it (`share` adds one); it is free again when the last one lets go.
    Freed blocks are reused oldest first, so what they hold stays readable as long as possible.
    """

    def __init__(self, num_blocks: int) -> None:
        """Make a pool of `num_blocks` blocks, scrap included; at least one must be usable."""
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}, expected at least 2: block 0 is scrap")
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(1, num_blocks))
        self._owners = [0] * num_blocks

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free)

    def owners(self, block: int) -> int:
        """Return how many tables hold `block`."""
        return self._owners[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one owner. Callers look at `num_free` first.

        Raises:
            BlockAccountingError: fewer are free; nothing is taken.
        """
        if count > len(self._free):
            raise BlockAccountingError(f"asked for {count} blocks, {len(self._free)} of {self.num_usable} are free")
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of `blocks`.

        Raises:
            BlockAccountingError: a block is free or scrap; nothing is changed.
        """
        blocks = list(blocks)
        for block in blocks:
            self._check_owned(block, "shared")
        for block in blocks:
            self._owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take one owner from each of `blocks`.

        Raises:
            BlockAccountingError: a block would have fewer than no owners, or is scrap; nothing is changed.
        """
        blocks = list(blocks)
        for block in blocks:
            self._check_owned(block, "freed")
        if len(set(blocks)) != len(blocks):
            twice = next(block for block in blocks if blocks.count(block) > 1)
            raise BlockAccountingError(f"block {twice} is named twice in one free; a table holds a block once")
        for block in blocks:
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)

    def check(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Verify that the pool and `tables`, the tables of all living sequences, agree.

        Raises:
            BlockAccountingError: with the terms that do not add up.
        """
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        owned = sum(1 for count in self._owners if count)
        terms = (
            f"{len(self._free)} free + {owned} owned of {self.num_usable} usable; "
            f"scrap has {self._owners[SCRAP_BLOCK]} owners"
        )
        if len(self._free) + owned != self.num_usable or self._owners[SCRAP_BLOCK]:
            raise BlockAccountingError(terms)
        for block in self._free:
            if self._owners[block] or block == SCRAP_BLOCK:
                raise BlockAccountingError(f"block {block} is free and has {self._owners[block]} owners; {terms}")
        for block, (counted, found) in enumerate(zip(self._owners, held)):
            if counted != found:
                raise BlockAccountingError(f"block {block}: {counted} owners counted, {found} tables hold it; {terms}")

    def _check_owned(self, block: int, verb: str) -> None:
        if not 0 < block < self.num_blocks:
            raise BlockAccountingError(f"block {block} {verb}, expected 1 to {self.num_blocks - 1} (0 is scrap)")
        if not self._owners[block]:
            raise BlockAccountingError(f"block {block} {verb}, but it has no owner")
