"""Run a compiled engine: `LLM(engine).generate(prompts, SamplingParams(...))`. No torch, no onnx.

Names are imported when first used, so that a command line which needs none of them starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import seekforge.plugins as _plugins  # noqa: F401  # first of all: it keeps libraries quiet

if TYPE_CHECKING:
    from seekforge.runtime.async_llm import AsyncLLM
    from seekforge.runtime.engine.engine_folder import Engine
    from seekforge.runtime.engine.outputs import (
        CompletionOutput,
        Delta,
        GenerationError,
        RequestMetrics,
        RequestOutput,
        Usage,
    )
    from seekforge.runtime.engine.scheduler import QueueFullError
    from seekforge.runtime.llm import LLM
    from seekforge.runtime.llm_metrics import LLMMetrics
    from seekforge.runtime.sampling.params import SamplingParams, StructuredOutputsParams
    from seekforge.runtime.sequence import TokenLogprobs

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Delta",
    "Engine",
    "GenerationError",
    "LLMMetrics",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenLogprobs",
    "Usage",
]

_MODULES = {
    "LLM": "llm",
    "LLMMetrics": "llm_metrics",
    "AsyncLLM": "async_llm",
    "Engine": "engine.engine_folder",
    "SamplingParams": "sampling.params",
    "StructuredOutputsParams": "sampling.params",
    "QueueFullError": "engine.scheduler",
    "TokenLogprobs": "sequence",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'engine.outputs')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
