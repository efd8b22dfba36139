"""Which cache blocks a sequence owns. Pure Python: no numpy, no device.

Every layer's caches are one pool of blocks of 64 slots, and a block number means the same block in all of
them (latent, indexer and MTP), so one table per sequence serves the whole model. Block 0 is scrap: kernels send
padded rows there, and it is never handed out.

A full block whose contents are computed is published under a digest of all tokens that they depend on. Another
sequence that starts with the same tokens shares it; blocks are never copied, and a published one is never written
again. A block that nobody owns stays published until it is handed out anew, oldest first: the free list is the prefix
cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from seekforge.formats.paged_cache import SCRAP_BLOCK, blocks_needed
from seekforge.runtime.block_table import BlockTable
from seekforge.runtime.engine.block_changes import BlockChanges

#: Returns the tokens at positions [start, stop) of a sequence.
Tokens = Callable[[int, int], Sequence[int]]


class BlockAccountingError(RuntimeError):
    """Blocks were freed twice, shared while free, or taken when none was left: a bug of ours."""


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the digest of a full block: it stands for these tokens after everything that `parent` stands for."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=parent, digest_size=16).digest()


def root_digest(*facts: object) -> bytes:
    """Return the digest that starts a chain: blocks under different facts (numerics, cache format, …) never match."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


class BlockPool:
    """Hands out blocks 1 … num_blocks − 1, counts their owners and knows which are published.

    A block has as many owners as tables name it (`share` adds one); it is free again when the last one lets go.
    Free blocks are reused unpublished ones first, then the one that was freed longest ago.

    Attributes:
        on_forget: called with a digest that finds no block any more.
    """

    def __init__(self, num_blocks: int) -> None:
        """Make a pool of `num_blocks` blocks, scrap included; at least one must be usable."""
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}, expected at least 2: block 0 is scrap")
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._owners = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self.on_forget: Callable[[bytes], None] | None = None

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now; published ones without an owner count."""
        return len(self._free)

    @property
    def num_published(self) -> int:
        """Blocks that a digest finds."""
        return len(self._block_of)

    def owners(self, block: int) -> int:
        """Return how many tables hold `block`."""
        return self._owners[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one owner; what they held is forgotten. Callers look at `num_free` first.

        Raises:
            BlockAccountingError: fewer are free; nothing is taken.
        """
        if count > len(self._free):
            raise BlockAccountingError(f"asked for {count} blocks, {len(self._free)} of {self.num_usable} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
            self.forget(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of `blocks`; each is owned or published.

        Raises:
            BlockAccountingError: a block holds nothing, or is scrap; nothing is changed.
        """
        blocks = list(blocks)
        for block in blocks:
            if not (0 < block < self.num_blocks and self._digest_of[block]):
                self._check_owned(block, "shared")
        for block in blocks:
            if not self._owners[block]:
                del self._free[block]
            self._owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take one owner from each of `blocks`, a table or its end. Later blocks of a table are reused before earlier.

        Raises:
            BlockAccountingError: a block would have fewer than no owners, or is scrap; nothing is changed.
        """
        blocks = list(blocks)
        for block in blocks:
            self._check_owned(block, "freed")
        if len(set(blocks)) != len(blocks):
            twice = next(block for block in blocks if blocks.count(block) > 1)
            raise BlockAccountingError(f"block {twice} is named twice in one free; a table holds a block once")
        for block in reversed(blocks):
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free[block] = None
                if self._digest_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, digest: bytes) -> None:
        """Let `digest` find `block`, unless it finds another block with the same contents already.

        Raises:
            BlockAccountingError: the block has no owner.
        """
        self._check_owned(block, "published")
        if digest not in self._block_of:
            self.forget(block)
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def find(self, digest: bytes) -> int | None:
        """Return the block published under `digest`."""
        return self._block_of.get(digest)

    def forget(self, block: int) -> None:
        """Unpublish `block`, if it is published. Its owners keep it."""
        digest = self._digest_of[block]
        if digest is not None:
            self._digest_of[block] = None
            del self._block_of[digest]
            if not self._owners[block]:
                self._free.move_to_end(block, last=False)
            if self.on_forget is not None:
                self.on_forget(digest)

    def forget_all(self) -> None:
        """Unpublish every block: what is cached no longer fits the weights."""
        for block in list(self._block_of.values()):
            self.forget(block)

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
        cached = sum(1 for block in self._free if self._digest_of[block] is not None)
        terms = (
            f"{len(self._free)} free ({cached} of them published) + {owned} owned of {self.num_usable} usable; "
            f"{len(self._block_of)} published; scrap has {self._owners[SCRAP_BLOCK]} owners"
        )
        if len(self._free) + owned != self.num_usable or self._owners[SCRAP_BLOCK]:
            raise BlockAccountingError(terms)
        for block in self._free:
            if self._owners[block] or block == SCRAP_BLOCK:
                raise BlockAccountingError(f"block {block} is free and has {self._owners[block]} owners; {terms}")
        for block, (counted, num_owners) in enumerate(zip(self._owners, held)):
            if counted != num_owners:
                raise BlockAccountingError(
                    f"block {block}: {counted} owners counted, {num_owners} tables hold it; {terms}"
                )
        named = {block: digest for block, digest in enumerate(self._digest_of) if digest is not None}
        if named != {block: digest for digest, block in self._block_of.items()} or SCRAP_BLOCK in named:
            raise BlockAccountingError(
                f"{len(named)} blocks name a digest, {len(self._block_of)} digests a block; {terms}"
            )

    def _check_owned(self, block: int, verb: str) -> None:
        if not 0 < block < self.num_blocks:
            raise BlockAccountingError(f"block {block} {verb}, expected 1 to {self.num_blocks - 1} (0 is scrap)")
        if not self._owners[block]:
            raise BlockAccountingError(f"block {block} {verb}, but it has no owner")


class KvCache:
    """Tables over a pool.

    Attributes:
        num_queried_tokens, num_hit_tokens: tokens that all `admit`s so far asked for, and those found in the cache.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, lookahead: int = 0) -> None:
        """Make an idle cache.

        Args:
            pool: the pool that blocks come from; nobody else takes from it.
            block_size: slots in a block.
            lookahead: tokens after a block on which its contents depend: 1 where the blocks hold MTP entries, which are
                computed from the next token. A block whose next token differs is not found. (To drop the last matched
                block instead is not enough: a block found before it may come from a sequence that ended there.)
        """
        self.pool = pool
        self.block_size = block_size
        self.lookahead = lookahead
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._changes: BlockChanges | None = None

    def follow(self) -> BlockChanges:
        """Return what notes from now on which blocks are published and forgotten."""
        if self._changes is None:
            self._changes = BlockChanges()
            self.pool.on_forget = self._changes.forgotten
        return self._changes

    def admit(
        self, table: BlockTable, tokens: Tokens, num_tokens: int, *, spare: int = 0, reuse: bool = True
    ) -> int | None:
        """Give an empty table blocks for `num_tokens` known tokens, shared as far as others computed them.

        Args:
            table: a table without blocks.
            tokens: the tokens of its sequence.
            num_tokens: number of tokens, at least 1; the last one is always computed anew, since its logits are wanted.
            spare: free blocks that must be left.
            reuse: look for published blocks.

        Returns:
            Positions whose cache entries are there already; None, with nothing changed, when too few blocks are free.
        """
        assert not table.blocks
        hits = self._match(table, tokens, (num_tokens - 1) // self.block_size) if reuse else []
        new = blocks_needed(num_tokens, self.block_size) - len(hits)
        if new + spare > self.pool.num_free - sum(1 for block in hits if not self.pool.owners(block)):
            return None
        self.pool.share(hits)
        table.blocks = hits + self.pool.allocate(new)
        table.version += 1
        table.num_published = len(hits)
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += len(hits) * self.block_size
        return len(hits) * self.block_size

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Add blocks until `num_tokens` fit; False, with nothing changed, when too few are free."""
        new = blocks_needed(num_tokens, self.block_size) - len(table.blocks)
        if new > self.pool.num_free:
            return False
        if new > 0:
            table.blocks += self.pool.allocate(new)
            table.version += 1
        return True

    def publish(self, table: BlockTable, tokens: Tokens, num_computed: int) -> None:
        """Let others find the full blocks among the first `num_computed` positions; one more token is known too."""
        full = num_computed // self.block_size
        if full <= table.num_published or not table.publishes:
            return
        self._digest(table, tokens, full)
        for index in range(table.num_published, full):
            digest = table.digests[index]
            is_new = self.pool.find(digest) is None
            self.pool.publish(table.blocks[index], digest)
            if is_new and self._changes is not None:
                block = tokens(index * self.block_size, (index + 1) * self.block_size)
                self._changes.published(digest, table.digests[index - 1] if index else None, block)
        table.num_published = full

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the blocks beyond `num_tokens`; published ones are never among them."""
        keep = blocks_needed(num_tokens, self.block_size)
        assert keep >= table.num_published, f"{table.num_published} blocks are published, asked to keep {keep}"
        if keep < len(table.blocks):
            self.pool.free(table.blocks[keep:])
            del table.blocks[keep:]
            table.version += 1

    def release(self, table: BlockTable, *, forget: bool = False) -> None:
        """Give back all blocks; with `forget`, nobody finds them again (their contents are in doubt)."""
        if forget:
            for block in table.blocks:
                self.pool.forget(block)
        self.pool.free(table.blocks)
        table.blocks = []
        table.num_published = 0
        table.version += 1

    def _match(self, table: BlockTable, tokens: Tokens, most: int) -> list[int]:
        """Return the published blocks that hold the longest known beginning, at most `most` of them."""
        hits: list[int] = []
        for index in range(most):
            self._digest(table, tokens, index + 1)
            block = self.pool.find(table.digests[index])
            if block is None:
                break
            hits.append(block)
        return hits

    def _digest(self, table: BlockTable, tokens: Tokens, count: int) -> None:
        for index in range(len(table.digests), count):
            parent = table.digests[-1] if table.digests else table.root
            block = tokens(index * self.block_size, (index + 1) * self.block_size + self.lookahead)
            table.digests.append(chain_digest(parent, block))
