"""How paged caches are divided into blocks: what programs, kernels, engines and the runtime agree on. No numpy.

slot = block · BLOCK_SIZE + offset. A block number means the same block in every cache of a model.
"""

from __future__ import annotations

#: Slots in a block. Fixed: the byte layouts of spec §7 and every kernel know it.
BLOCK_SIZE = 64
#: The block that is never handed out: padded rows are written there.
SCRAP_BLOCK = 0


def blocks_needed(num_tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Return how many blocks hold `num_tokens` tokens; the last may be part full."""
    return -(-num_tokens // block_size)
