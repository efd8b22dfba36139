"""A model whose engine is to compute what it computes: weights are learned in f32, and run as a checkpoint holds them.

Gradients are those of the rounded weights and move the exact ones (straight-through). So the log-probabilities of an
engine that was given `tensors` are the model's, however coarse FP8 is beside a step of the optimizer.
"""

from __future__ import annotations

import torch

from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.weights import check_form, round_weights


class Policy:
    """The model that learns. The MTP module stays as it is: it only drafts.

    Attributes:
        model: holds the rounded weights; backward passes go through it.
        tensors: checkpoint tensor -> value, of the weights as they are now, for `LLM.update_weights`.
    """

    def __init__(self, model: TrainedModel, *, learning_rate: float, max_grad_norm: float = 1.0) -> None:
        """Make a policy of a model with its weights, which are rounded.

        Args:
            model: the model.
            learning_rate: the rate of AdamW.
            max_grad_norm: gradients are scaled down to this norm.

        Raises:
            ConfigError: the checkpoint's weights are neither in FP8 blocks nor in BF16.
        """
        check_form(model.config)
        self.model, self.max_grad_norm = model, max_grad_norm
        learned = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
        self._pairs = [(p, p.detach().clone()) for p in learned]
        masters = [master for _, master in self._pairs]
        self.optimizer = torch.optim.AdamW(masters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.tensors = round_weights(self.model, mtp=False)

    def step(self) -> float:
        """Update the weights by the gradients, forget these and return their norm."""
        for parameter, master in self._pairs:
            master.grad, parameter.grad = parameter.grad, None
        norm = torch.nn.utils.clip_grad_norm_([master for _, master in self._pairs], self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self._pairs:
                parameter.copy_(master)
        self.tensors = round_weights(self.model, mtp=False)
        return norm.item()
