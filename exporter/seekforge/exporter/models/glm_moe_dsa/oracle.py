"""What parity needs of `transformers`' GLM-5: its class, and what is seen inside while it runs."""

from __future__ import annotations

from typing import Any

from seekforge.exporter.models.shared.sparse.oracle import selections, watch

__all__ = ["model_class", "selections", "watch"]


def model_class() -> Any:
    """Return the class, which has `from_pretrained`."""
    from transformers import GlmMoeDsaForCausalLM

    return GlmMoeDsaForCausalLM
