"""What a program computes outside its layers, as operations between points: into the first layer, and out.

As `layer_operations`, for the ends: the embedding, what the MTP module makes of an embedding and a hidden state, and
the final norm with the head. Nothing else is in memory.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from seekforge.exporter.models.shared.layer_operations import Op, OuterModule, Values
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.step import Step
from seekforge.formats.step_io import INTERMEDIATE_TENSORS
from seekforge.formats.weight_recipes import TensorSource

_TABLES: Final = ("rope_cos", "rope_sin", "hadamard")
_EMBEDDING: Final = "embed_tokens"
_COMBINATION: Final = "eh_proj"
_COMBINED: Final = (_EMBEDDING, _COMBINATION, "enorm", "hnorm")
_NORM: Final = "norm"
_HEAD: Final = "lm_head"


class Tables:
    """The tables that all layers of a step look up."""

    def __init__(self, settings: Settings, source: TensorSource) -> None:
        self._outer = OuterModule(settings, 0, source, _TABLES)

    def step(self, positions: Tensor, slot_mapping: Tensor, block_table: Tensor) -> Step:
        """Return what all layers of one step share, as `StepModel.make_step`."""
        return self._outer.module.make_step(positions, slot_mapping, block_table)


class TokenEmbedding:
    """The embedding of tokens; `op` names it, and reads its own output, since tokens are no point."""

    def __init__(self, settings: Settings, source: TensorSource) -> None:
        self._outer = OuterModule(settings, 0, source, (_EMBEDDING,))
        self.op = _made(_EMBEDDING, "token embedding", self._outer.tensors(_EMBEDDING))

    def run(self, ids: Tensor) -> Tensor:
        """[B, Q] int64 -> [B, Q, hidden_size]."""
        return self._outer.module.token_embedding()(ids)


class MtpInput:
    """What goes into the MTP layer, of an embedding and the main model's hidden state; `op` names it.

    Args:
        settings: how it computes.
        layer: the MTP layer's number.
        source: the checkpoint.
    """

    def __init__(self, settings: Settings, layer: int, source: TensorSource) -> None:
        self._outer = OuterModule(settings, layer, source, _COMBINED)
        self.op = _made(_COMBINATION, "embedding and hidden state as one", self._outer.tensors(*_COMBINED))

    def run(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Tokens t_{i+1} [B, Q] int64 and hidden states h_i [B, Q, hidden_size] -> [B, Q, hidden_size]."""
        return self._outer.module.combine(ids, hidden)


class Head:
    """Final norm and LM head.

    Args:
        settings: how it computes.
        layer: the last layer of the program; the MTP layer's number for the MTP module.
        source: the checkpoint.
    """

    def __init__(self, settings: Settings, layer: int, source: TensorSource) -> None:
        self._outer = OuterModule(settings, layer, source, (_NORM, _HEAD))

    def operations(self, logits_index: Tensor) -> list[Op]:
        """Return the operations of a step; logits_index: [N] int64, the rows of B·Q that get logits."""
        module = self._outer.module

        def normed(values: Values) -> Tensor:
            return module.norm.add(values["hidden_states"], values["residual"])[0]

        def logits(values: Values) -> Tensor:
            return module.logits(values["hidden"], logits_index)

        return [
            Op(_NORM, "final norm", INTERMEDIATE_TENSORS, "hidden", normed, self._outer.tensors(_NORM)),
            Op(_HEAD, "logits", ("hidden",), "logits", logits, self._outer.tensors(_HEAD)),
        ]


def _made(module: str, does: str, tensors: tuple[str, ...]) -> Op:
    """Return an operation on what is no point of a layer, by which alone its output is named."""
    return Op(module, does, (), "hidden_states", lambda values: values["hidden_states"], tensors)
