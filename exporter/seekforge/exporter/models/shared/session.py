"""The PyTorch model as something that runs steps over paged caches: the reference of self-checks and tests.

`formats.step_runner` says what that is; `parity` has a reference of its own that holds one layer at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from seekforge.exporter.models import family_of
from seekforge.exporter.models.shared.model import MtpModel, StepModel
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.weights import load_weights, widen_weights
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.step_io import MODEL, MTP, StepInputs, lay_out
from seekforge.formats.weight_recipes import TensorSource


class TorchOutputs(dict[str, Tensor]):
    """Outputs of one step as tensors, by name."""

    def fetch(self, name: str) -> np.ndarray:
        """Return one output as an array; bf16 becomes f32."""
        return to_numpy(self[name])


class TorchSession:
    """A model with its caches. The weights of each graph are read when it is first run.

    Args:
        settings: how it computes.
        source: the checkpoint; must stay open.
        num_blocks: size of the paged caches; None: `allocate_caches` comes before the first step.
        layer_range: layers [a, b) of the main model; None takes all.
    """

    def __init__(
        self,
        settings: Settings,
        source: TensorSource,
        num_blocks: int | None = None,
        *,
        layer_range: tuple[int, int] | None = None,
    ) -> None:
        self.settings, self.source, self.num_blocks = settings, source, num_blocks
        self.layer_range = layer_range or (0, settings.config.num_hidden_layers)
        self._modules: dict[str, StepModel | MtpModel] = {}
        #: The caches of the graphs that were run, by name: [NB·64, width], dtype of the activations.
        self.caches: dict[str, Tensor] = {}

    def module(self, graph: str = MODEL) -> StepModel | MtpModel:
        """Return the module of a graph, with its weights."""
        if graph not in self._modules:
            with torch.device("meta"):
                made = family_of(self.settings.config).module("model")
                module: StepModel | MtpModel = (
                    made.MtpModel(self.settings) if graph == MTP else made.StepModel(self.settings, self.layer_range)
                )
            load_weights(module, self.source)
            widen_weights(module)
            self._modules[graph] = module
            if self.num_blocks is not None:
                self.caches |= module.new_caches(self.num_blocks)
        return self._modules[graph]

    def output_names(self, graph: str = MODEL) -> list[str]:
        """Return the results and taps that a graph gives."""
        module = self.module(graph)
        return [*module.result_names(), *module.tap_names()]

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks; earlier ones are forgotten."""
        self.num_blocks, self.caches = num_blocks, {}
        for module in self._modules.values():
            self.caches |= module.new_caches(num_blocks)

    def run(self, inputs: StepInputs, *, outputs: Collection[str] | None = None, graph: str = MODEL) -> TorchOutputs:
        """Run one step and keep its caches.

        Args:
            inputs: the step.
            outputs: names of results and taps to return; None returns all.
            graph: `MODEL` or `MTP`.
        """
        module = self.module(graph)
        names = module.cache_names()
        assert names[0] in self.caches, "allocate_caches comes before run"
        tokens = [torch.from_numpy(inputs.array(name)) for name in module.token_names()]
        with torch.inference_mode():
            results = module(
                tuple(one.to(self.settings.dtype) if one.is_floating_point() else one for one in tokens),
                torch.from_numpy(inputs.positions),
                torch.from_numpy(inputs.slot_mapping),
                torch.from_numpy(inputs.block_table),
                torch.from_numpy(inputs.logits_index),
                [
                    [self.caches[f"{kind}.{layer}"] for layer in module.layers_with(kind)]
                    for kind in module.cache_kinds()
                ],
            )
        values = dict(zip([*module.result_names(), *names, *module.tap_names()], results, strict=True))
        # new tensors beside the old ones, so that whoever kept `caches` can go back to them
        self.caches = self.caches | {name: values.pop(name) for name in names}
        return TorchOutputs({name: value for name, value in values.items() if outputs is None or name in outputs})

    def cache(self, name: str) -> np.ndarray:
        """Return a copy of one cache, such as `latent_cache.3`; bf16 becomes f32."""
        return to_numpy(self.caches[name]).copy()

    def prefill(self, prompt: Sequence[int]) -> TorchOutputs:
        """Run one whole prompt as a single step from an empty cache, with logits for every position."""
        num_blocks = blocks_needed(len(prompt))
        self.allocate_caches(1 + num_blocks)
        return self.run(lay_out([prompt], [0], [range(1, 1 + num_blocks)]))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array that shares its memory where it can; floats become f32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
