"""The operations of a layer behind its attention, which are those of DeepSeek-V3.2."""

from seekforge.exporter.models.deepseek_v32.mlp_ops import mlp_ops

__all__ = ["mlp_ops"]
