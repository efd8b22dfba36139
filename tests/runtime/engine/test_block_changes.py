"""What a router is told of a cache is what prompts find in it, whatever comes and goes."""

from __future__ import annotations

import random

from seekforge.runtime.block_table import BlockTable
from seekforge.runtime.engine.block_changes import BlockChange, BlockChanges, block_number
from seekforge.runtime.engine.kv_cache import BlockPool, KvCache, root_digest

SIZE = 4


class Router:
    """Follows one engine: number -> (number before, tokens)."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    def follow(self, changes: list[BlockChange]) -> None:
        for block, parent, token_ids in changes:
            if token_ids is None:
                del self.blocks[block]  # it was told of
            else:
                assert block not in self.blocks and (parent is None or parent in self.blocks)
                self.blocks[block] = parent, token_ids

    def matches(self, tokens: list[int]) -> int:
        """Return how many blocks of a prompt it believes the engine to have."""
        parent = None
        for index in range(len(tokens) // SIZE):
            number = block_number(parent, tokens[index * SIZE : (index + 1) * SIZE])
            if number not in self.blocks:
                return index
            parent = number
        return len(tokens) // SIZE


def admitted(cache: KvCache, prompt: list[int], root: bytes) -> BlockTable | None:
    table = BlockTable(root)
    return table if cache.admit(table, lambda a, b: prompt[a:b], len(prompt)) is not None else None


def test_the_router_believes_what_the_cache_finds() -> None:
    """Few blocks and few tokens: prompts share beginnings, and blocks are evicted all the time."""
    draw, root = random.Random(0), root_digest("weights")
    cache, router = KvCache(BlockPool(12), SIZE), Router()
    changes, living, agreed = cache.follow(), [], 0
    for _ in range(600):
        prompt = [draw.randrange(2) for _ in range(draw.randrange(SIZE + 1, 5 * SIZE))]
        believed = router.matches(prompt[: (len(prompt) - 1) // SIZE * SIZE])
        before = cache.num_hit_tokens
        table = admitted(cache, prompt, root)
        if table is not None:
            hits = (cache.num_hit_tokens - before) // SIZE
            assert believed <= hits, "it believes in no block that is not there"
            agreed += believed == hits
            cache.publish(table, lambda a, b, held=prompt: held[a:b], len(prompt))
            living.append(table)
        while len(living) > draw.randrange(3):
            cache.release(living.pop(draw.randrange(len(living))))
        router.follow(changes.take())
    assert agreed > 300
    cache.pool.forget_all()
    router.follow(changes.take())
    assert router.blocks == {}


def test_blocks_that_differ_in_what_no_prompt_says_are_one_until_the_last_goes() -> None:
    changes = BlockChanges()
    changes.published(b"one", None, [1, 2])
    changes.published(b"drafted", None, [1, 2])
    changes.published(b"next", b"drafted", [3, 4])
    first, second = changes.take()
    assert first.token_ids == (1, 2) and second.parent == first.block and second.token_ids == (3, 4)
    changes.forgotten(b"one")
    assert changes.take() == []
    changes.forgotten(b"drafted")
    assert changes.take() == [BlockChange(first.block)]


def test_a_block_behind_one_that_is_gone_is_not_told() -> None:
    changes = BlockChanges()
    changes.published(b"first", None, [1])
    changes.forgotten(b"first")
    changes.published(b"second", b"first", [2])
    changes.forgotten(b"second")
    assert [change.token_ids for change in changes.take()] == [(1,), None]


def test_numbers_fit_where_they_are_signed_and_stand_for_all_tokens_before() -> None:
    numbers = {block_number(parent, [5, 6]) for parent in (None, 0, 1, (1 << 63) - 1)}
    assert len(numbers) == 4 and all(0 <= number < 1 << 63 for number in numbers)
