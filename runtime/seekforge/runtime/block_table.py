"""Which blocks of the paged caches one sequence has. `engine/kv_cache.py` fills and empties it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class BlockTable:
    """The blocks of one sequence.

    Attributes:
        root: starts the chain of digests (`engine.kv_cache.root_digest`).
        blocks: block i holds positions i * block_size and on.
        digests: digests of the first full blocks of the sequence, as far as they were needed; kept when blocks are not.
        num_published: how many leading blocks were matched or published.
        version: changes whenever `blocks` does.
        owner: a number that the sequences of one request share.
        publishes: whether others may find its blocks; off when something of them is missing (MTP entries).
    """

    root: bytes
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    num_published: int = 0
    version: int = 0
    owner: int = 0
    publishes: bool = True
