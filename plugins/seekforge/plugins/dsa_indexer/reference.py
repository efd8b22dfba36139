"""`DsaIndexer` in plain torch: all scores, a stable sort, the first k. Never `topk`: it breaks ties at will."""

import torch
from torch import Tensor

from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.quant import fake_quantize, unpack_index_keys

_MAX = torch.finfo(torch.float32).max


def logical_slots(block_table: Tensor) -> Tensor:
    """Return the cache slot of every logical position: [B, MB] int32 -> [B, MB · 64] int64."""
    offsets = torch.arange(BLOCK_SIZE, device=block_table.device)
    return (block_table.long().unsqueeze(-1) * BLOCK_SIZE + offsets).flatten(1)


def index_scores(
    q: Tensor, w: Tensor, index_cache: Tensor, block_table: Tensor, positions: Tensor, indexer_fp8: bool, fmt: str
) -> Tensor:
    """Return the score of every key for every query, −inf where the key is not visible.

    Args:
        as `dsa_indexer`.

    Returns:
        [B, Q, MB · 64] f32; finite for every visible key.
    """
    q = (fake_quantize(q) if indexer_fp8 else q).float()
    slots = logical_slots(block_table)
    keys = unpack_index_keys(index_cache, slots) if fmt == "fp8_ds" else index_cache[slots].float()  # [B, L, D]
    score = torch.zeros(*positions.shape, keys.shape[1], dtype=torch.float32, device=q.device)
    for head in range(q.shape[2]):
        score += w[:, :, head, None] * torch.relu(q[:, :, head] @ keys.transpose(1, 2))
    score = torch.nan_to_num(score, nan=-_MAX, posinf=_MAX, neginf=-_MAX)
    visible = torch.arange(keys.shape[1], device=q.device) <= positions.unsqueeze(-1)
    return score.masked_fill(~visible, -torch.inf)


def dsa_indexer(
    q: Tensor,
    w: Tensor,
    index_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
    index_topk: int,
    indexer_fp8: bool,
    index_format: str,
) -> Tensor:
    """Return the positions of the `index_topk` best visible keys of each query.

    Args:
        q: [B, Q, Hi, D], f32 or bf16.
        w: [B, Q, Hi] f32, with Hi^-½ · D^-½ folded in and no query scale.
        index_cache: [NB·64, D] f32 or bf16, or [NB, 64·132] int8 for fp8_ds.
        block_table: [B, MB] int32.
        positions: [B, Q] int64; −1 sees nothing.

    Returns:
        [B, Q, index_topk] int32: ascending, −1 fills. Equal scores go to the lowest position.

    Source: HF inference/model.py, `Indexer.forward`; the tie rule is ours (spec §3.7).
    """
    score = index_scores(q, w, index_cache, block_table, positions, indexer_fp8, index_format)
    order = torch.sort(score, dim=-1, descending=True, stable=True)
    k = min(index_topk, score.shape[-1])
    nowhere = score.shape[-1]
    best = torch.where(order.values[..., :k] > -torch.inf, order.indices[..., :k], nowhere)
    best = torch.sort(best, dim=-1).values
    best = torch.where(best == nowhere, -1, best)
    return torch.nn.functional.pad(best, (0, index_topk - k), value=-1).to(torch.int32)
