"""One layer of the PyTorch model as a list of small operations between tap points.

Run from its own values, the list is the layer: the free run of the reference, whose every step is seen. Run from the
values that an engine had at each point, each operation answers for itself alone: what it gives differs from the
engine's value by the order of a sum and nothing else, in every numerics, since both sides quantize the same numbers.
So the first operation that differs by more is where the fault is, and nothing before it or behind it is blamed.

The lists are in the model family's `operations`, up to the cache write and behind it; here is what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seekforge.exporter.models import family_of
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.step import Step
from seekforge.exporter.models.shared.weights import recipes, to_torch, widen_weights
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.weight_recipes import Recipe, TensorSource, evaluate, tensors_of
from seekforge.formats.weight_recipes.stored import names_read

#: Points of the next layer, as a layer's operations call them.
NEXT = {"next_hidden_states": "hidden_states", "next_residual": "residual"}
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Columns [start, stop) of an operation's output that come from one checkpoint module."""

    start: int
    stop: int
    module: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        module: path of the module below the layer, as the checkpoint calls it.
        does: what it computes, for people.
        inputs: points it reads. `residual` may be missing (layer 0, MTP).
        output: point it gives.
        run: values of its inputs -> its output.
        tensors: checkpoint tensors it reads, full names.
        parts: columns of an output that several checkpoint modules share; empty where one gives it all.
    """

    module: str
    does: str
    inputs: tuple[str, ...]
    output: str
    run: Callable[[Values], Tensor]
    tensors: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()


@dataclass
class LayerState:
    """What one side has cached for one layer, and the step it is in."""

    caches: dict[str, Tensor]
    step: Step = field(init=False)


class LayerModule:
    """One decoder layer with its weights. Nothing of other layers is in memory.

    Args:
        settings: how it computes.
        layer: absolute number; the MTP layer's for the MTP module.
        source: the checkpoint.
    """

    def __init__(self, settings: Settings, layer: int, source: TensorSource) -> None:
        self.settings, self.config, self.layer = settings, settings.config, layer
        with torch.device("meta"):
            # a family's own class: its operations know what it is made of
            self.module: Any = family_of(self.config).module("model").DecoderLayer(settings, layer)
        self._operations = family_of(self.config).module("operations")
        prefix = f"layers.{layer}."
        self._recipes = {
            name.removeprefix(prefix): recipe
            for name, recipe in recipes(_program(settings, layer)).items()
            if name.startswith(prefix)
        }
        state = {name: to_torch(evaluate(recipe, source)) for name, recipe in self._recipes.items()}
        self.module.load_state_dict(state, strict=True, assign=True)
        widen_weights(self.module)

    def new_state(self, num_blocks: int) -> LayerState:
        """Return zeroed caches."""
        slots, dtype = num_blocks * BLOCK_SIZE, self.settings.cache_dtype
        widths = family_of(self.config).caches(self.config, self.layer)
        return LayerState({kind: torch.zeros(slots, width, dtype=dtype) for kind, width in widths.items()})

    def tensors(self, *modules: str) -> tuple[str, ...]:
        """Return the checkpoint tensors behind the parameters of modules of this layer."""
        return _tensors_behind(self._recipes, modules)

    def stored(self, module: str) -> tuple[str, ...]:
        """Return the checkpoint tensors that hold a matrix, by its module below the layer."""
        name = f"model.layers.{self.layer}.{module}.weight"
        return names_read(self.config.weight_form(name), name)

    def apply(
        self,
        module: str,
        does: str,
        before: str,
        after: str,
        run: Callable[[Tensor], Tensor],
        parts: tuple[Part, ...] = (),
    ) -> Op:
        """Return the operation of one module on one point; its tensors are those of the module's name."""
        return Op(module, does, (before,), after, lambda v: run(v[before]), self.tensors(module), parts)

    def before_cache(self, state: LayerState) -> list[Op]:
        """Return the operations up to the cache write."""
        return self._operations.before_cache(self, state)

    def behind_cache(self, state: LayerState) -> list[Op]:
        """Return the operations behind the cache write: the rest of the attention, and the MLP."""
        return self._operations.behind_cache(self, state)

    def shows_cached(self, values: Values) -> bool:
        """Whether all that goes into the caches is among `values`."""
        return values.keys() >= set(self._operations.cached(self))

    def write_cache(self, state: LayerState, values: Values) -> None:
        """Put this step's rows into the caches of `state`."""
        self._operations.write_cache(self, state, values)

    def key_scores(self, state: LayerState, values: Values) -> Tensor:
        """Return [B, Q, L] scores by which keys are chosen, for a family that chooses keys."""
        return self._operations.key_scores(self, state, values)


class OuterModule:
    """What the program that holds a layer has outside its layers: tables, embedding, norms, projection and head.

    Args:
        settings: how it computes.
        layer: absolute number; the MTP layer's for the MTP module.
        source: the checkpoint.
        modules: names of the modules, or parameters, that get their weights. No others are in memory.
    """

    def __init__(self, settings: Settings, layer: int, source: TensorSource, modules: Sequence[str]) -> None:
        #: The family's own step program without layers.
        self.module: Any = _program(settings, layer, layers=())
        self._recipes = {
            name: recipe for name, recipe in recipes(self.module).items() if name.partition(".")[0] in modules
        }
        state = {name: to_torch(evaluate(recipe, source)) for name, recipe in self._recipes.items()}
        self.module.load_state_dict(state, strict=False, assign=True)

    def tensors(self, *modules: str) -> tuple[str, ...]:
        """Return the checkpoint tensors behind some of the modules."""
        return tuple(tensor for module in modules for tensor in _tensors_behind(self._recipes, (module,)))


def _tensors_behind(named: Mapping[str, Recipe], modules: Sequence[str]) -> tuple[str, ...]:
    """Return the checkpoint tensors of recipes of these modules, in the order of the recipes."""
    tensors = [
        tensor
        for name, recipe in named.items()
        for module in modules
        if name == module or name.startswith(f"{module}.")
        for tensor in sorted(tensors_of(recipe))
    ]
    return tuple(dict.fromkeys(tensors))


def _program(settings: Settings, layer: int, *, layers: Sequence[int] | None = None) -> Any:
    """Return the family's step program that holds `layer`, with all of its layers or `layers`; without any weight."""
    with torch.device("meta"):
        made = family_of(settings.config).module("model")
        if layer == settings.config.mtp_layer:
            return made.MtpModel(settings, layers=layers)
        return made.StepModel(settings, (layer, layer + 1), layers=layers)
