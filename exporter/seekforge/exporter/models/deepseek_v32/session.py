"""Run the PyTorch model step by step over paged caches: the reference side of parity and of self-checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seekforge.exporter.models import family_of
from seekforge.exporter.models.deepseek_v32.model import MtpModel, StepModel
from seekforge.exporter.models.deepseek_v32.step import Settings
from seekforge.exporter.models.deepseek_v32.weights import load_weights
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.step_io import StepInputs, lay_out
from seekforge.formats.weight_recipes import TensorSource
from seekforge.plugins.operator import cdiv


def shuffled_tables(lengths: Sequence[int], seed: int = 0) -> tuple[list[list[int]], int]:
    """Give each sequence blocks for `lengths` tokens in random order; returns (tables, number of blocks).

    Block 0 is scrap and never handed out; one spare block at the end belongs to nobody.
    """
    needed = [cdiv(length, BLOCK_SIZE) for length in lengths]
    order = (np.random.default_rng(seed).permutation(sum(needed)) + 1).tolist()
    tables, start = [], 0
    for count in needed:
        tables.append(order[start : start + count])
        start += count
    return tables, sum(needed) + 2


class TorchSession:
    """A model with its caches.

    Args:
        settings: how it computes.
        source: the checkpoint; must stay open.
        num_blocks: size of the paged caches.
        layer_range: layers of the main model; None takes all.
        mtp: run the MTP module instead of the main model.
    """

    def __init__(
        self,
        settings: Settings,
        source: TensorSource,
        num_blocks: int,
        *,
        layer_range: tuple[int, int] | None = None,
        mtp: bool = False,
    ) -> None:
        config = settings.config
        with torch.device("meta"):
            made = family_of(config).module("model")
            layers = layer_range or (0, config.num_hidden_layers)
            self.model: StepModel | MtpModel = made.MtpModel(settings) if mtp else made.StepModel(settings, layers)
        load_weights(self.model, source)
        self.caches = self.model.new_caches(num_blocks)

    def step(self, inputs: StepInputs, hidden: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
        """Run one step and keep its caches.

        Args:
            inputs: token ids and bookkeeping.
            hidden: (hidden_states, residual) for a range that does not start at layer 0; (hidden_in,) for MTP.

        Returns:
            Results and taps by name.
        """
        model = self.model
        takes_ids = "input_ids" in model.token_names()
        tokens = (torch.from_numpy(inputs.input_ids), *hidden) if takes_ids else hidden
        with torch.inference_mode():
            outputs = model(
                tokens,
                torch.from_numpy(inputs.positions),
                torch.from_numpy(inputs.slot_mapping),
                torch.from_numpy(inputs.block_table),
                torch.from_numpy(inputs.logits_index),
                self.caches,
            )
        names = [*model.result_names(), *model.cache_names(), *model.tap_names()]
        named = dict(zip(names, outputs, strict=True))
        written = [named.pop(name) for name in model.cache_names()]
        kinds = len(self.caches)
        self.caches = [written[kind::kinds] for kind in range(kinds)]
        return named

    def prefill(self, prompt: Sequence[int]) -> dict[str, Tensor]:
        """Run one whole prompt as a single step from an empty cache, with logits for every position."""
        blocks = list(range(1, 1 + cdiv(len(prompt), BLOCK_SIZE)))
        return self.step(lay_out([prompt], [0], [blocks]))
