"""GRPO as DeepSeek-V3.2 has it (spec §15): the objective, without the model and without the engine.

Log-probabilities of the policy that sampled are the engine's own. Where engine and trainer differ, by rounding, by
choices that are not replayed or by updates in between, the ratio of both is what corrects it, and what is too far off
is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GrpoSettings:
    """How the objective is weighed.

    Attributes:
        clip_low, clip_high: the ratio of new to sampling probability counts from 1 − clip_low to 1 + clip_high.
        kl_weight: the weight of the divergence from the reference policy; 0 leaves it out.
        max_divergence: a completion with a negative advantage whose sampling policy lies further, in mean nats per
            token, from the policy that learns is left out.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_weight: float = 0.001
    max_divergence: float = 0.1


@dataclass(frozen=True)
class GrpoLoss:
    """What an objective gives.

    Attributes:
        total: what is minimized.
        kl: estimate of KL(policy ‖ reference), mean over completions, nats per token; 0 without a reference.
        clipped: share of sampled tokens whose ratio was clipped.
        masked: share of completions that were left out.
        divergence: mean of log(sampling probability / new probability) over completions, nats per token.
    """

    total: Tensor
    kl: float
    clipped: float
    masked: float
    divergence: float


def group_advantages(rewards: Tensor) -> Tensor:
    """Return [groups, n] rewards minus the mean of their group; not divided by the deviation (spec §15)."""
    return rewards - rewards.mean(-1, keepdim=True)


def unbiased_kl(new: Tensor, sampling: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(new ‖ reference) at sampled tokens; its gradient is unbiased too.

    The estimate of K3, r − log r − 1 with r = reference / new, holds under samples of `new`; these are of `sampling`,
    so that each is weighed with new / sampling. Source: arXiv 2512.02556, section 3.1.

    Args:
        new, sampling, reference: log-probabilities of the same shape.
    """
    log_ratio = reference - new
    return torch.exp(new - sampling) * (torch.exp(log_ratio) - log_ratio - 1)


def grpo_loss(
    new: Tensor,
    sampling: Tensor,
    advantages: Tensor,
    sampled: Tensor,
    settings: GrpoSettings,
    reference: Tensor | None = None,
) -> GrpoLoss:
    """Return the objective of B completions, each the mean of its tokens.

    Args:
        new: [B, L] f32, log-probabilities of the policy that learns; takes the gradient.
        sampling: [B, L], with which the tokens were sampled.
        advantages: [B].
        sampled: [B, L] bool, the tokens that count.
        settings: how it is weighed.
        reference: [B, L], of the policy that is not to be left; None: there is none.
    """
    counts = sampled.sum(-1).clamp_min(1)
    weight = sampled / counts.unsqueeze(-1)
    difference = torch.where(sampled, new - sampling, 0.0)
    divergence = -(difference.detach() * weight).sum(-1)
    kept = ~((advantages < 0) & (divergence > settings.max_divergence))
    ratio, gain = difference.exp(), advantages.unsqueeze(-1)
    bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    objective = torch.minimum(ratio * gain, bounded * gain) * kept.unsqueeze(-1)
    clipped = ((ratio * gain) > (bounded * gain)) & sampled
    kl = torch.zeros(())
    if reference is not None and settings.kl_weight:
        estimate = torch.where(sampled, unbiased_kl(new, sampling, reference), 0.0)
        kl = (estimate * weight).sum(-1).mean()
    total = settings.kl_weight * kl - (objective * weight).sum(-1).mean()
    share = clipped.sum() / sampled.sum().clamp_min(1)
    return GrpoLoss(total, kl.item(), share.item(), (~kept).float().mean().item(), divergence.mean().item())
