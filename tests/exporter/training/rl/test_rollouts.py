"""An engine's rollouts in the trainer: the same choices, the same log-probabilities, and weights that go back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from seekforge import LLM, SamplingParams
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.rl.grpo import GrpoSettings, group_advantages, grpo_loss
from seekforge.exporter.training.rl.policy import Policy
from seekforge.exporter.training.rl.rollouts import RolloutBatch, token_logprobs
from seekforge.exporter.training.weights import read_weights
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.runtime.rollout import Rollout, RolloutEngine

#: Largest difference of a log-probability between an f32 engine of exact numerics and the trainer: sums of another
#: order. Measured: 9e-6 at most, 1.7e-6 in the mean (docs/rl.md).
TOLERANCE = 1e-4
PARAMS = SamplingParams(n=2, temperature=1.0, max_tokens=5, ignore_eos=True)


@pytest.fixture
def model(tiny_checkpoint: Path, tiny_config: ModelConfig) -> TrainedModel:
    model = TrainedModel(tiny_config)
    with Checkpoint.open(tiny_checkpoint) as source:
        read_weights(model, source)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 1000, length).tolist() for length in lengths]


def largest_gap(values: torch.Tensor, batch: RolloutBatch) -> float:
    return (values - batch.logprobs)[batch.sampled].abs().max().item()


def test_replay_makes_the_choices_of_the_engine_and_its_log_probabilities(
    tiny_engines: dict[str, Path], model: TrainedModel
) -> None:
    with LLM(tiny_engines["exact"], num_blocks=20, threads=1, self_check=False) as llm:
        groups = RolloutEngine(llm).generate(prompts(80, 6), PARAMS, seed=1)
    rollouts = [one for group in groups for one in group]
    batch = RolloutBatch.of(rollouts)
    assert batch.ids.shape == (4, 85) and batch.sampled.sum() == 4 * 5
    with torch.no_grad():
        values, chosen = token_logprobs(model, batch)
        free, own = token_logprobs(model, batch, replay=False)
    assert largest_gap(values, batch) < TOLERANCE and largest_gap(free, batch) < TOLERANCE
    for row, one in enumerate(rollouts):
        assert_choices(one, row, chosen.experts, chosen.keys, batch.ids.shape[1])
        assert_choices(one, row, own.experts, own.keys, batch.ids.shape[1])


def assert_choices(one: Rollout, row: int, experts: list[torch.Tensor], keys: list[torch.Tensor], length: int) -> None:
    """Compare what the trainer's layers chose for one rollout with what the engine recorded."""
    assert one.expert_ids is not None and one.topk_indices is not None
    assert (len(experts), len(keys)) == (len(one.expert_ids), len(one.topk_indices))
    for layer, recorded in enumerate(one.expert_ids):
        count = len(recorded)
        chosen = experts[layer].view(-1, length, recorded.shape[1])[row, :count]
        assert (chosen.sort(-1).values.numpy() == np.sort(recorded, -1)).all()
    for layer, recorded in enumerate(one.topk_indices):
        for position in (0, 5, len(recorded) - 1):
            mask = keys[layer][row, position].nonzero().flatten().tolist()
            assert mask == sorted(recorded[position][recorded[position] >= 0].tolist())


def test_choices_that_the_trainer_would_not_make_are_replayed(
    tiny_engines: dict[str, Path], model: TrainedModel
) -> None:
    """An engine of fp8 numerics chooses otherwise here and there: replay halves the distance at least."""
    with LLM(tiny_engines["fp8"], num_blocks=20, threads=1, self_check=False) as llm:
        groups = RolloutEngine(llm).generate(prompts(90), PARAMS, seed=1)
    batch = RolloutBatch.of(groups[0])
    with torch.no_grad():
        values, chosen = token_logprobs(model, batch)
        _, own = token_logprobs(model, batch, replay=False)
    for row, one in enumerate(groups[0]):
        assert_choices(one, row, chosen.experts, chosen.keys, batch.ids.shape[1])
    assert any((a != b).any() for a, b in zip(own.keys, batch.replay.keys))
    assert largest_gap(values, batch) > TOLERANCE  # its products are rounded to FP8, and the trainer's are not


@pytest.mark.slow
def test_two_steps_of_grpo_move_the_engine_with_the_trainer(tiny_engines: dict[str, Path], model: TrainedModel) -> None:
    """The reward is the share of even tokens; after each update the engine has the trainer's log-probabilities."""
    policy = Policy(model, learning_rate=3e-4)
    params = SamplingParams(n=8, temperature=1.0, max_tokens=12, ignore_eos=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    rewards: list[float] = []
    with LLM(tiny_engines["exact"], num_blocks=60, threads=1, self_check=False) as llm:
        engine = RolloutEngine(llm, max_staleness=0)
        before = llm.generate(prompts(70), greedy)[0].outputs[0].token_ids
        for step in range(3):
            groups = engine.generate(prompts(70, 5), params, seed=step)
            gains = torch.tensor([[sum(t % 2 == 0 for t in one.token_ids) / 12 for one in group] for group in groups])
            rewards.append(gains.mean().item())
            assert all(one.weight_version == step for group in groups for one in group)
            batch = RolloutBatch.of([one for group in groups for one in group])
            new, _ = token_logprobs(policy.model, batch)
            assert largest_gap(new.detach(), batch) < TOLERANCE
            one = grpo_loss(new, batch.logprobs, group_advantages(gains).flatten(), batch.sampled, GrpoSettings())
            one.total.backward()
            assert policy.step() > 0
            assert engine.update_weights(policy.tensors) == step + 1
            assert engine.fresh(groups[0]) == []
        after = llm.generate(prompts(70), greedy)[0].outputs[0]
        assert after.token_ids != before and after.weight_version == 3
        assert rewards[2] > rewards[0] + 0.1
