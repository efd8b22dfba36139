"""`DsaIndexer` in plain torch: all scores, the k-th best of them, all above it and the first that equal it.

`topk` gives that score alone: which of equal ones it names is left to chance.
"""

import torch
from torch import Tensor

from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.quant import fake_quantize, unpack_index_keys

_ROWS = 256  # queries per pass: bounds the scores [B, _ROWS, L]
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
        product = q[:, :, head] @ keys.transpose(1, 2)
        score += product.relu_().mul_(w[:, :, head, None])
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
    best = torch.full((*positions.shape, index_topk), -1, dtype=torch.int32, device=q.device)
    for start in range(0, positions.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        blocks = max(1, int(positions[:, rows].max()) // BLOCK_SIZE + 1)  # those behind hold nothing that is visible
        score = index_scores(
            q[:, rows], w[:, rows], index_cache, block_table[:, :blocks], positions[:, rows], indexer_fp8, index_format
        )
        chosen = first_best(score, index_topk)
        best[:, rows, : chosen.shape[-1]] = chosen.to(torch.int32)
    return best


def first_best(score: Tensor, k: int) -> Tensor:
    """Return where the `k` best scores of each row stand, of equal ones those that stand first.

    Args:
        score: [..., L] f32; -inf is never chosen.
        k: how many to choose at most.

    Returns:
        [..., min(k, L)] int64: ascending, -1 fills.
    """
    length = score.shape[-1]
    k = min(k, length)
    least = torch.topk(score, k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = score > least, (score == least) & (least > -torch.inf)
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    filled = torch.arange(k, device=score.device) < chosen.sum(-1, keepdim=True)
    return torch.full_like(filled, -1, dtype=torch.int64).masked_scatter(filled, chosen.nonzero()[:, -1])
