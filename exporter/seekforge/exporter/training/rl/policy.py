"""A model whose engine is to compute what it computes: weights are learned in f32, and run as a checkpoint holds them.

Gradients are those of the rounded weights and move the exact ones (straight-through). So the log-probabilities of an
engine that was given `tensors` are the model's, however coarse FP8 is beside a step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from seekforge.common.dtypes import NUMPY
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.weights import check_form, named_tensors
from seekforge.formats.quantization.block_fp8 import quantize
from seekforge.formats.value_check import SCALE_SUFFIX
from seekforge.formats.weight_recipes.evaluation import dequantize_into


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
        self.tensors = self._round()

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
        self.tensors = self._round()
        return norm.item()

    def _round(self) -> dict[str, np.ndarray]:
        """Round the model's weights in place to what a checkpoint holds; returns that."""
        tensors: dict[str, np.ndarray] = {}
        expected = expected_tensors(self.model.config)
        for name, view in _learned(self.model):
            values = view.detach().numpy()
            if expected[name].dtype == "f8e4m3":
                stored, scale = quantize(values)
                tensors[name], tensors[name + SCALE_SUFFIX] = stored, scale
                dequantize_into(stored, scale, values)
            else:
                tensors[name] = values.astype(NUMPY[expected[name].dtype])
                values[...] = tensors[name]
        return tensors


def _learned(model: TrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint without those of the MTP module, its copies of the ends among them."""
    drafts = f"model.layers.{model.config.num_hidden_layers}."
    return ((name, view) for name, view in named_tensors(model) if not name.startswith(drafts))
