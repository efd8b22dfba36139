"""How paged caches are divided into blocks: what programs, kernels, engines and the runtime agree on. No numpy.

slot = block · BLOCK_SIZE + offset. A block number means the same block in every cache of a model.
"""

from __future__ import annotations

from seekforge.formats.numerics import FP8_BLOCK

#: Slots in a block. Fixed: the byte layouts of spec §7 and every kernel know it.
BLOCK_SIZE = 64
#: The block that is never handed out: padded rows are written there.
SCRAP_BLOCK = 0


def blocks_needed(num_tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Return how many blocks hold `num_tokens` tokens; the last may be part full."""
    return -(-num_tokens // block_size)


def latent_row_bytes(kv_lora_rank: int, qk_rope_head_dim: int, kv_format: str) -> int:
    """Return the bytes of one token's latent and rotary key in a layer's cache.

    `fp8_ds`: e4m3 latent, f32 scale per 128, bf16 rotary key (656 for V3.2; spec §7); else the values of bf16 or f32.
    """
    if kv_format == "fp8_ds":
        return kv_lora_rank + 4 * -(-kv_lora_rank // FP8_BLOCK) + 2 * qk_rope_head_dim
    return (kv_lora_rank + qk_rope_head_dim) * (2 if kv_format == "bf16" else 4)


def index_row_bytes(index_head_dim: int, index_format: str) -> int:
    """Return the bytes of one token's indexer key in a layer's cache; `fp8_ds` has one f32 scale (spec §7)."""
    return index_head_dim + 4 if index_format == "fp8_ds" else index_head_dim * (2 if index_format == "bf16" else 4)
