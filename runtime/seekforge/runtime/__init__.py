"""Run a compiled engine: `LLM(engine).generate(prompts, SamplingParams(...))`. No torch, no onnx.

Names are imported when first used, so that a command line which needs none of them starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seekforge.runtime.engine import Engine
    from seekforge.runtime.llm import LLM, CompletionOutput, Delta, RequestMetrics, RequestOutput
    from seekforge.runtime.sampling import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Delta",
    "Engine",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]

_MODULES = {"Engine": "engine", "SamplingParams": "sampling"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'llm')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
