"""Block tables: arithmetic at the edges, and the pool against a model that is a plain dict."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from seekforge.runtime.kv_cache import BlockAccountingError, BlockPool, blocks_needed, slots_for


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2)])
def test_last_block_may_be_part_full(num_tokens: int, blocks: int) -> None:
    assert blocks_needed(num_tokens, block_size=64) == blocks


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
    with pytest.raises(BlockAccountingError, match=r"block 2: 1 owners counted, 0 tables hold it; 1 free \+ 2 owned"):
        pool.check([[1]])


def test_a_pool_needs_a_usable_block() -> None:
    with pytest.raises(ValueError, match="block 0 is scrap"):
        BlockPool(1)


class PoolMachine(RuleBasedStateMachine):
    """Tables are lists of blocks; the model is the multiset of what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9)
        self.tables: list[list[int]] = []

    def held(self) -> set[int]:
        return {block for table in self.tables for block in table}

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        free = 8 - len(self.held())
        if count > free:
            with pytest.raises(BlockAccountingError):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count and not set(blocks) & (self.held() | {0})
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.share(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @rule(block=st.integers(-1, 10))
    def misuse(self, block: int) -> None:
        if block not in self.held():
            for call in (self.pool.free, self.pool.share):
                with pytest.raises(BlockAccountingError):
                    call([block])

    @invariant()
    def pool_agrees(self) -> None:
        self.pool.check(self.tables)
        assert self.pool.num_free == 8 - len(self.held())
        for block in range(1, 9):
            assert self.pool.owners(block) == sum(table.count(block) for table in self.tables)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
