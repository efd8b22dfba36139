"""Rollouts of an engine as a trainer reads them: rows of tokens, what was sampled, and the choices to replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from seekforge.exporter.training.model import Choices, TrainedModel

#: The document of positions behind the end of a row.
_PADDING = -1


class Sampled(Protocol):
    """What is read of a rollout (`seekforge.runtime.rollout.Rollout` is one)."""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> np.ndarray: ...
    @property
    def expert_ids(self) -> np.ndarray | None: ...
    @property
    def topk_indices(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts side by side, filled up to the length L of the longest.

    Attributes:
        ids: [B, L] int64.
        documents: [B, L] int64; −1 behind the end of a row.
        sampled: [B, L] bool, the tokens that the policy chose.
        logprobs: [B, L] f32, with which it did; 0 elsewhere.
        replay: what the engine's layers chose; empty where it was not recorded.
    """

    ids: Tensor
    documents: Tensor
    sampled: Tensor
    logprobs: Tensor
    replay: Choices

    @staticmethod
    def of(rollouts: Sequence[Sampled]) -> RolloutBatch:
        """Lay rollouts out.

        Args:
            rollouts: at least one; choices are replayed where all of them have theirs.
        """
        lengths = [len(one.prompt_token_ids) + len(one.token_ids) for one in rollouts]
        shape = (len(rollouts), max(lengths))
        ids, documents = torch.zeros(shape, dtype=torch.int64), torch.full(shape, _PADDING)
        sampled, logprobs = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        for row, (one, length) in enumerate(zip(rollouts, lengths)):
            prompt = len(one.prompt_token_ids)
            ids[row, :length] = torch.tensor([*one.prompt_token_ids, *one.token_ids])
            documents[row, :length] = 0
            sampled[row, prompt:length] = True
            logprobs[row, prompt:length] = torch.from_numpy(one.logprobs)
        replay = Choices(_keys(rollouts, shape[1]), _experts(rollouts, shape[1]))
        return RolloutBatch(ids, documents, sampled, logprobs, replay)


def token_logprobs(model: TrainedModel, batch: RolloutBatch, *, replay: bool = True) -> tuple[Tensor, Choices]:
    """Run rollouts through the model.

    Args:
        model: the model; attention is sparse, as in an engine.
        batch: B rollouts.
        replay: let layers choose what the engine's chose; else what they would.

    Returns:
        [B, L] f32, the log-probability of each sampled token at temperature 1, 0 elsewhere; and what was chosen.
    """
    context = model.context(batch.documents, sparse=True)
    if replay:
        context.replay = batch.replay
    hidden = model.hidden(batch.ids, context)[:, :-1]
    where = batch.sampled[:, 1:]
    chosen = F.linear(hidden[where], model.lm_head).log_softmax(-1)
    values = chosen.gather(1, batch.ids[:, 1:][where].unsqueeze(1)).squeeze(1)
    result = torch.zeros(batch.ids.shape).masked_scatter(batch.sampled, values)
    return result, context.chosen


def _keys(rollouts: Sequence[Sampled], length: int) -> list[Tensor]:
    """Return the chosen keys per layer, [B, L, L] bool. The last token of a row and what is behind see themselves."""
    recorded = [one.topk_indices for one in rollouts if one.topk_indices is not None]
    if len(recorded) < len(rollouts):
        return []
    # one column more takes the −1 that fill rows up
    masks = torch.zeros(len(recorded[0]), len(rollouts), length, length + 1, dtype=torch.bool)
    for row, chosen in enumerate(recorded):
        index = torch.from_numpy(chosen).long()
        masks[:, row, : index.shape[1]].scatter_(-1, torch.where(index < 0, length, index), True)
    masks = masks[..., :length]
    masks |= torch.eye(length, dtype=torch.bool) & ~masks.any(-1, keepdim=True)
    return list(masks)


def _experts(rollouts: Sequence[Sampled], length: int) -> list[Tensor]:
    """Return the chosen experts per MoE layer, [B·L, k]; positions that were not computed take the first k."""
    recorded = [one.expert_ids for one in rollouts if one.expert_ids is not None]
    if len(recorded) < len(rollouts):
        return []
    layers, _, count = recorded[0].shape
    ids = torch.arange(count).expand(layers, len(rollouts), length, count).clone()
    for row, chosen in enumerate(recorded):
        ids[:, row, : chosen.shape[1]] = torch.from_numpy(chosen)
    return list(ids.flatten(1, 2))
