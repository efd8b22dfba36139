"""Muon for the matrices of the layers, AdamW for the rest; the same step in any process.

Source: Muon, K. Jordan et al. 2024, github.com/KellerJordan/Muon (the quintic iteration and its coefficients); the
scale of updates as in "Muon is scalable for LLM training" (arXiv 2502.16982), so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seekforge.exporter.training.initial import PLANTED_LAYERS
from seekforge.exporter.training.model import Attention, Layer, Mlp, Mtp, TrainedModel


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Return [..., N, K] with all singular values near one."""
    tall = update.shape[-2] > update.shape[-1]
    x = update.transpose(-1, -2) if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.transpose(-1, -2) if tall else x


class Optimizer:
    """Updates a model's parameters in place.

    Args:
        model: the model.
        matrix_rate, other_rate: the largest learning rates of matrices and of the rest.
        weight_decay: the decay of matrices.
        slow_rate: factor on the rate of the `planted` matrices.
    """

    def __init__(
        self, model: TrainedModel, matrix_rate: float, other_rate: float, weight_decay: float, slow_rate: float = 1.0
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = {id(p) for p in _matrices(model)}
        self.matrices = {name: p for name, p in named.items() if id(p) in matrices}
        self.planted = {id(p) for p in planted(model)}
        others = [p for name, p in named.items() if name not in self.matrices]
        self.rates, self.weight_decay, self.slow_rate = (matrix_rate, other_rate), weight_decay, slow_rate
        self.adam = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.97), eps=1e-10, weight_decay=0.0)
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}

    def step(self, factor: float, momentum: float = 0.95) -> None:
        """Take a step with both learning rates times `factor`, and forget the gradients; without one nothing moves."""
        for group in self.adam.param_groups:
            group["lr"] = self.rates[1] * factor
        self.adam.step()
        with torch.no_grad():
            for name, p in self.matrices.items():
                if p.grad is None:
                    continue
                rate = self.rates[0] * factor * (self.slow_rate if id(p) in self.planted else 1.0)
                kept = self.momenta[name].lerp_(p.grad, 1 - momentum)
                update = orthogonalize(p.grad.lerp(kept, momentum))
                p.mul_(1 - rate * self.weight_decay)
                p.add_(update, alpha=-rate * max(p.shape[-2:]) ** 0.5 * 0.2)
        for p in (*self.matrices.values(), *(q for group in self.adam.param_groups for q in group["params"])):
            p.grad = None

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return {"adam": self.adam.state_dict(), "momenta": self.momenta}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state; settings are not taken from it.

        Raises:
            Exception: it is no state of these parameters; of many classes.
        """
        settings = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": state["adam"]["state"], "param_groups": settings})
        pairs = [(p, kept[key]) for p, kept in self.adam.state.items() for key in ("exp_avg", "exp_avg_sq")]
        pairs += [(p, state["momenta"][name]) for name, p in self.matrices.items()]
        if any(kept.shape != p.shape for p, kept in pairs):
            raise ValueError("a moment has not the shape of its parameter")
        for name, kept in self.momenta.items():
            kept.copy_(state["momenta"][name])


def _matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what Muon updates: the matrices of the layers that each token is multiplied with, but for the indexer's.

    Experts are left to AdamW, whose step costs a tenth: 32 matrices a layer, each of few tokens.
    """
    for module in model.modules():
        if isinstance(module, Attention | Mlp | Mtp):
            yield from (p for p in module.parameters(recurse=False) if p.dim() == 2)


def planted(model: TrainedModel) -> Iterator[nn.Parameter]:
    """Yield the parameters of the attention of the layers in which `initial` plants heads."""
    for layer in model.layers[:PLANTED_LAYERS]:
        assert isinstance(layer, Layer)
        yield from layer.self_attn.parameters(recurse=False)
