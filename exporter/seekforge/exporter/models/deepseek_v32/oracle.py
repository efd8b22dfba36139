"""What parity needs of `transformers`' DeepSeek-V3.2: its class, and what is seen inside while it runs."""

from __future__ import annotations

from typing import Any

from seekforge.exporter.models.shared.sparse.oracle import selections, watch

__all__ = ["model_class", "selections", "watch"]


def model_class() -> Any:
    """Return the class, which has `from_pretrained`."""
    from transformers import DeepseekV32ForCausalLM

    return DeepseekV32ForCausalLM
