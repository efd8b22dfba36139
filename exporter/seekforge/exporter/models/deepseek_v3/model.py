"""The step programs of DeepSeek-V3: those of DeepSeek-V3.2 with another attention."""

from __future__ import annotations

from seekforge.exporter.models.deepseek_v3.attention import Attention
from seekforge.exporter.models.deepseek_v32 import model as v32


class DecoderLayer(v32.DecoderLayer):
    """Attention and MLP, each behind an add-and-norm."""

    attention = Attention


class StepModel(v32.StepModel):
    """Layers [start, stop) of the main model."""

    layer = DecoderLayer
    selections = ()


class MtpModel(v32.MtpModel):
    """The multi-token-prediction module."""

    layer = DecoderLayer
    selections = ()
