"""Block tables: arithmetic at the edges, and the cache against a naive model that copies contents around."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from seekforge.formats.paged_cache import blocks_needed
from seekforge.runtime.block_table import BlockTable
from seekforge.runtime.engine.kv_cache import (
    BlockAccountingError,
    BlockPool,
    KvCache,
    chain_digest,
    root_digest,
)


def slots_for(blocks: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """Return the cache slot of each position in [start, stop).

    Args:
        blocks: the sequence's block table; it must reach position `stop - 1`.
        start, stop: positions in the sequence.
        block_size: slots in a block. slot = block_id * block_size + offset.
    """
    assert stop <= len(blocks) * block_size, f"position {stop - 1} is beyond a table of {len(blocks)} blocks"
    return [blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (0, 12), (3, 4), (3, 5), (4, 8), (5, 11), (11, 12)])
def test_slots_follow_the_table(start: int, stop: int) -> None:
    table = [7, 2, 9]
    expected = [table[p // 4] * 4 + p % 4 for p in range(start, stop)]
    assert slots_for(table, start, stop, block_size=4) == expected


def test_slots_beyond_the_table_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="position 8 is beyond a table of 2 blocks"):
        slots_for([1, 2], 0, 9, block_size=4)


def test_scrap_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(BlockAccountingError, match="asked for 1 blocks, 0 of 4 are free"):
        pool.allocate(1)
    with pytest.raises(BlockAccountingError, match="block 0 freed"):
        pool.free([0])


def test_double_free_changes_nothing() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.free([first])
    with pytest.raises(BlockAccountingError, match=f"block {first} freed, but it has no owner"):
        pool.free([second, first])
    with pytest.raises(BlockAccountingError, match="named twice"):
        pool.free([second, second])
    pool.check([[second]])


def test_check_names_what_does_not_add_up() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    terms = r"block 2: 1 owners counted, 0 tables hold it; 1 free \(0 of them published\) \+ 2 owned of 3 usable"
    with pytest.raises(BlockAccountingError, match=terms):
        pool.check([[1]])


def test_a_pool_needs_a_usable_block() -> None:
    with pytest.raises(ValueError, match="block 0 is scrap"):
        BlockPool(1)


def test_published_blocks_outlive_their_owner_and_go_oldest_first() -> None:
    pool = BlockPool(6)
    blocks = pool.allocate(4)
    for block in blocks[:3]:
        pool.publish(block, bytes([block]))
    pool.free(blocks)
    assert [pool.find(bytes([block])) for block in blocks[:3]] == blocks[:3]
    # the unpublished ones first, then the end of the table
    assert sorted(pool.allocate(2)) == sorted([blocks[3], 5])
    assert pool.allocate(1) == [blocks[2]] and pool.find(bytes([blocks[2]])) is None
    pool.share(blocks[:1])
    assert pool.num_free == 1
    pool.forget_all()
    assert pool.num_published == 0
    with pytest.raises(BlockAccountingError, match="shared, but it has no owner"):
        pool.share(blocks[1:2])


def test_digests_cover_everything_before_them() -> None:
    one, other = root_digest("exact", "f32"), root_digest("fp8", "f32")
    assert chain_digest(one, [1, 2]) == chain_digest(one, (1, 2))
    assert len({chain_digest(one, [1, 2]), chain_digest(other, [1, 2]), chain_digest(one, [2, 1])}) == 3


@pytest.mark.parametrize(
    ("same", "found", "found_with_mtp"), [(3, 0, 0), (4, 4, 0), (5, 4, 4), (8, 8, 4), (9, 8, 8), (12, 8, 8)]
)
def test_a_match_ends_at_a_block_and_before_the_last_token(same: int, found: int, found_with_mtp: int) -> None:
    """With MTP a block is no match if the token after it differs: its last entry was computed from that token."""

    def one(start: int, stop: int) -> list[int]:
        return list(range(12))[start:stop]

    def two(start: int, stop: int) -> list[int]:
        return [*range(same), *[99] * (12 - same)][start:stop]

    for lookahead, expected in ((0, found), (1, found_with_mtp)):
        cache = KvCache(BlockPool(20), 4, lookahead=lookahead)
        first, second = BlockTable(b"r"), BlockTable(b"r")
        assert cache.admit(first, one, 12) == 0
        cache.publish(first, one, 11)
        assert cache.admit(second, two, 12) == expected
        assert second.blocks[: expected // 4] == first.blocks[: expected // 4]


BLOCK = 4


class CacheMachine(RuleBasedStateMachine):
    """Sequences of tokens whose "cache" is what was last written to each slot of their blocks.

    The naive model writes tokens into slots; whatever tables say, each sequence must read its own tokens back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.cache = KvCache(self.pool, BLOCK)
        self.slots: list[tuple[int, ...] | None] = [None] * (12 * BLOCK)
        self.living: list[tuple[BlockTable, list[int], list[int]]] = []  # table, tokens, [num_computed]

    def write(self, table: BlockTable, tokens: list[int], start: int, stop: int) -> None:
        """A slot's contents depend on every token so far, as a hidden state does."""
        for position, slot in zip(range(start, stop), slots_for(table.blocks, start, stop, BLOCK), strict=True):
            self.slots[slot] = tuple(tokens[: position + 1])

    def pick(self, data: st.DataObject) -> tuple[BlockTable, list[int], list[int]]:
        return data.draw(st.sampled_from(self.living))

    @rule(data=st.data(), length=st.integers(1, 18), reuse=st.booleans())
    def admit(self, data: st.DataObject, length: int, reuse: bool) -> None:
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        table, free = BlockTable(b"root"), self.pool.num_free
        found = self.cache.admit(table, lambda a, b: tokens[a:b], length, reuse=reuse)
        if found is None:
            assert not table.blocks and self.pool.num_free == free
            return
        assert found % BLOCK == 0 and found < length
        self.write(table, tokens, found, length)
        self.living.append((table, tokens, [length]))

    @precondition(lambda self: self.living)
    @rule(data=st.data(), extra=st.integers(1, 6))
    def grow(self, data: st.DataObject, extra: int) -> None:
        table, tokens, computed = self.pick(data)
        free, new = self.pool.num_free, blocks_needed(len(tokens) + extra, BLOCK) - len(table.blocks)
        assert self.cache.grow(table, len(tokens) + extra) == (new <= free)
        if new <= free:
            tokens += data.draw(st.lists(st.integers(0, 1), min_size=extra, max_size=extra))
            self.write(table, tokens, computed[0], len(tokens))
            computed[0] = len(tokens)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table, tokens, computed = self.pick(data)
        self.cache.publish(table, lambda a, b: tokens[a:b], computed[0])

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        table, tokens, computed = self.pick(data)
        keep = data.draw(st.integers(max(table.num_published * BLOCK, 1), max(len(tokens), 1)))
        del tokens[keep:]
        del table.digests[keep // BLOCK :]
        computed[0] = keep
        self.cache.truncate(table, keep)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Another sequence with the same tokens: it shares what is published."""
        _, tokens, _ = self.pick(data)
        table, copy = BlockTable(b"root"), list(tokens)
        found = self.cache.admit(table, lambda a, b: copy[a:b], len(copy))
        if found is not None:
            self.write(table, copy, found, len(copy))
            self.living.append((table, copy, [len(copy)]))

    @precondition(lambda self: self.living)
    @rule(data=st.data(), forget=st.booleans())
    def release(self, data: st.DataObject, forget: bool) -> None:
        entry = self.pick(data)
        self.living.remove(entry)
        self.cache.release(entry[0], forget=forget)

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()

    @rule(block=st.integers(-1, 13))
    def misuse(self, block: int) -> None:
        if all(block not in table.blocks for table, _, _ in self.living):
            with pytest.raises(BlockAccountingError):
                self.pool.free([block])
            with pytest.raises(BlockAccountingError):
                self.pool.publish(block, b"x")

    @invariant()
    def pool_agrees(self) -> None:
        self.pool.check([table.blocks for table, _, _ in self.living])
        assert self.pool.num_free == 11 - len({block for table, _, _ in self.living for block in table.blocks})

    @invariant()
    def everybody_reads_its_own_tokens(self) -> None:
        for table, tokens, computed in self.living:
            read = [self.slots[slot] for slot in slots_for(table.blocks, 0, computed[0], BLOCK)]
            assert read == [tuple(tokens[: position + 1]) for position in range(computed[0])]


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
