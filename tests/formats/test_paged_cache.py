import pytest

from seekforge.formats.paged_cache import BLOCK_SIZE, blocks_needed


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2)])
def test_the_last_block_may_be_part_full(num_tokens: int, blocks: int) -> None:
    assert blocks_needed(num_tokens, block_size=64) == blocks


def test_blocks_have_the_size_that_byte_layouts_are_made_for() -> None:
    assert BLOCK_SIZE == 64 and blocks_needed(65) == 2
