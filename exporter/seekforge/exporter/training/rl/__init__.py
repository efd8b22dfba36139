"""Reinforcement learning: a policy that is updated from what its engine sampled (docs/rl.md)."""
