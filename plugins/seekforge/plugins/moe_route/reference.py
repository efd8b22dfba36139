"""`MoeRoute` in plain torch, with stable sorts in place of topk."""

import torch
from torch import Tensor


def biased_scores(logits: Tensor, bias: Tensor, n_group: int, topk_group: int) -> tuple[Tensor, Tensor]:
    """Return (scores that weigh, scores that select), both [T, E] f32; −inf outside the kept groups."""
    scores = torch.sigmoid(logits)
    biased = scores + bias
    groups = biased.unflatten(-1, (n_group, -1))
    group_score = torch.sort(groups, dim=-1, descending=True).values[..., :2].sum(-1)
    kept = torch.sort(group_score, dim=-1, descending=True, stable=True).indices[..., :topk_group]
    mask = torch.zeros_like(group_score, dtype=torch.bool).scatter(-1, kept, True)
    return scores, groups.masked_fill(~mask.unsqueeze(-1), -torch.inf).flatten(-2)


def moe_route(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, norm: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the experts of each token and their weights.

    Args:
        logits: [T, E] f32. bias: [E] f32.

    Returns:
        expert_ids [T, top_k] int32, expert_weights [T, top_k] f32.

    Source: HF inference/model.py, `Gate.forward`; +1e-20 as in transformers (spec §12).
    """
    scores, selecting = biased_scores(logits, bias, n_group, topk_group)
    ids = torch.sort(selecting, dim=-1, descending=True, stable=True).indices[..., :top_k]
    weights = torch.gather(scores, -1, ids)
    if norm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids.to(torch.int32), weights * scale
