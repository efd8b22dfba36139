"""The losses of a pass: next token, the token after it (MTP), and the indexer's (spec §6, §15)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from seekforge.exporter.training.batches import Batch
from seekforge.exporter.training.model import Context, TrainedModel


@dataclass(frozen=True)
class Losses:
    """What a pass gives.

    Attributes:
        total: what is minimized.
        next_token: mean negative log-likelihood of the learned tokens, nats.
        mtp: the same of the token after the next one.
        indexer: mean KL divergence of attention from the indexer's scores, over layers and positions.
        context: what the layers left: loads of experts.
    """

    total: Tensor
    next_token: float
    mtp: float
    indexer: float
    context: Context


def losses(
    model: TrainedModel,
    batch: Batch,
    *,
    sparse: bool,
    mtp_weight: float,
    rows: Tensor | None,
) -> Losses:
    """Run a batch forward.

    Args:
        model: the model.
        batch: the rows.
        sparse: attention sees the indexer's choice alone.
        mtp_weight: lambda of the MTP loss.
        rows: positions whose indexer is trained.
    """
    context = model.context(batch.documents, sparse=sparse, rows=rows)
    hidden = model.hidden(batch.ids, context)
    same = batch.documents[:, 1:] == batch.documents[:, :-1]
    learned = batch.learned[:, 1:] & same
    next_token = nll(model, hidden[:, :-1], batch.ids[:, 1:], learned)
    total, mtp = next_token, torch.zeros(())
    if model.mtp is not None and mtp_weight > 0:
        drafted = model.draft(hidden, batch.ids.roll(-1, 1), context)
        two = batch.documents[:, 2:] == batch.documents[:, :-2]
        mtp = nll(model, drafted[:, :-2], batch.ids[:, 2:], batch.learned[:, 2:] & two)
        total = total + mtp_weight * mtp
    indexer = torch.stack(context.index_losses).mean() if context.index_losses else torch.zeros(())
    total = total + len(context.index_losses) * indexer
    return Losses(total, next_token.item(), mtp.item(), indexer.item(), context)


def nll(model: TrainedModel, hidden: Tensor, targets: Tensor, where: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the targets where they are learned."""
    if not bool(where.any()):
        return hidden.sum() * 0
    return F.cross_entropy(F.linear(hidden[where], model.lm_head), targets[where])
