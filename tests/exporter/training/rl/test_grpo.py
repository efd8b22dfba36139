"""The objective of GRPO, against its formulas."""

from __future__ import annotations

import math

import pytest
import torch

from seekforge.exporter.training.rl.grpo import GrpoSettings, group_advantages, grpo_loss, unbiased_kl

PLAIN = GrpoSettings(clip_low=0.2, clip_high=0.3, kl_weight=0.5, max_divergence=0.1)


def test_advantages_are_not_divided_by_the_deviation() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]]))
    assert advantages.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]


def test_ratios_are_clipped_where_they_have_gone_far_enough() -> None:
    sampling = torch.zeros(4, 1)
    new = torch.tensor([[1.5], [0.5], [1.5], [0.95]]).log().requires_grad_()
    sampled, advantages = torch.ones(4, 1, dtype=torch.bool), torch.tensor([1.0, 1.0, -1.0, -1.0])
    one = grpo_loss(new, sampling, advantages, sampled, PLAIN)
    assert one.total.item() == pytest.approx(-(1.3 + 0.5 - 1.5 - 0.95) / 4)
    one.total.backward()
    assert new.grad is not None
    assert new.grad.flatten().tolist() == pytest.approx([0.0, -0.5 / 4, 1.5 / 4, 0.95 / 4])
    assert one.clipped == 0.25 and one.masked == 0.0


def test_a_completion_counts_the_mean_of_its_own_tokens() -> None:
    new, sampling = torch.tensor([[9.0, 0.0, 0.0], [9.0, 9.0, 0.0]]), torch.zeros(2, 3)
    sampled = torch.tensor([[False, True, True], [False, False, True]])
    one = grpo_loss(new, sampling, torch.tensor([1.0, 3.0]), sampled, PLAIN)
    assert one.total.item() == pytest.approx(-2.0) and one.divergence == 0.0


def test_what_is_bad_and_of_another_policy_is_left_out() -> None:
    """The mask looks at negative advantages alone, and at the mean over the completion."""
    sampling = torch.zeros(3, 2)
    new = torch.tensor([[-0.3, 0.0], [-0.3, 0.0], [-0.3, 0.2]]).requires_grad_()
    sampled, advantages = torch.ones(3, 2, dtype=torch.bool), torch.tensor([-1.0, 1.0, -1.0])
    one = grpo_loss(new, sampling, advantages, sampled, PLAIN)
    one.total.backward()
    assert new.grad is not None
    assert one.masked == pytest.approx(1 / 3)
    assert new.grad[0].tolist() == [0.0, 0.0] and (new.grad[1:] != 0).any(-1).all()


def test_the_divergence_is_estimated_without_bias_under_samples_of_another_policy() -> None:
    """Expected over the sampling policy the estimate is KL(new || reference), and so is its gradient."""
    logits = torch.tensor([0.3, -0.5, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    sampling = torch.tensor([1.0, 0.2, -0.3, 0.4], dtype=torch.float64).log_softmax(-1)
    reference = torch.tensor([-0.2, 0.9, 0.1, 0.3], dtype=torch.float64).log_softmax(-1)
    new = logits.log_softmax(-1)
    exact = (new.exp() * (new - reference)).sum()
    expected = (sampling.exp() * unbiased_kl(new, sampling, reference)).sum()
    assert expected.item() == pytest.approx(exact.item(), abs=1e-12)
    (of_exact,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (of_expected,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(of_exact, of_expected, atol=1e-12)


def test_the_divergence_is_part_of_the_loss() -> None:
    new, sampling, reference = torch.zeros(1, 2), torch.zeros(1, 2), torch.full((1, 2), math.log(2))
    sampled = torch.tensor([[False, True]])
    one = grpo_loss(new, sampling, torch.tensor([0.0]), sampled, PLAIN, reference)
    assert one.kl == pytest.approx(1 - math.log(2)) and one.total.item() == pytest.approx(0.5 * one.kl)
