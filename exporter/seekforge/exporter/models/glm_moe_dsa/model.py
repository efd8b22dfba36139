"""The step programs of GLM-5: those of all families, with its attention."""

from __future__ import annotations

from typing import Final

from seekforge.exporter.models.glm_moe_dsa.attention import Attention
from seekforge.exporter.models.shared import model

#: What the attention of a layer chooses.
SELECTIONS: Final[tuple[str, ...]] = ("topk_indices",)


class DecoderLayer(model.DecoderLayer):
    """Attention and MLP, each behind an add-and-norm."""

    attention = Attention


class StepModel(model.StepModel):
    """Layers [start, stop) of the main model."""

    layer = DecoderLayer
    selections = SELECTIONS


class MtpModel(model.MtpModel):
    """The multi-token-prediction module."""

    layer = DecoderLayer
    selections = SELECTIONS
