"""The public names of `seekforge`.

Each is imported when it is first used: a server imports the runtime without torch, a build without the runtime.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seekforge.common.errors import (
        CheckpointError,
        ConfigError,
        EngineError,
        EnvironmentFault,
        OptionError,
        OutputError,
        ProgramError,
        RequestError,
        SeekforgeError,
        ShapeError,
        TargetError,
    )
    from seekforge.exporter.builder.api import BuildResult, build
    from seekforge.exporter.parity.api import ParityResult, parity
    from seekforge.exporter.planner.api import PlanResult, plan
    from seekforge.exporter.program.api import ExportResult, export
    from seekforge.exporter.training.api import TrainResult, train
    from seekforge.runtime import (
        LLM,
        AsyncLLM,
        CompletionOutput,
        Delta,
        Engine,
        GenerationError,
        LLMMetrics,
        QueueFullError,
        RequestMetrics,
        RequestOutput,
        SamplingParams,
        StructuredOutputsParams,
        TokenLogprobs,
        Usage,
    )

# A library is silent unless the program that uses it listens: to the logger "seekforge", and those below it.
logging.getLogger("seekforge").addHandler(logging.NullHandler())

__version__: str

_HOMES = {
    "seekforge.exporter.program.api": ("ExportResult", "export"),
    "seekforge.exporter.builder.api": ("BuildResult", "build"),
    "seekforge.exporter.planner.api": ("PlanResult", "plan"),
    "seekforge.exporter.parity.api": ("ParityResult", "parity"),
    "seekforge.exporter.training.api": ("TrainResult", "train"),
    "seekforge.runtime": (
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
    ),
    "seekforge.common.errors": (
        "CheckpointError",
        "ConfigError",
        "EngineError",
        "EnvironmentFault",
        "OptionError",
        "OutputError",
        "ProgramError",
        "RequestError",
        "SeekforgeError",
        "ShapeError",
        "TargetError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BuildResult",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "Engine",
    "EngineError",
    "EnvironmentFault",
    "ExportResult",
    "GenerationError",
    "LLMMetrics",
    "OptionError",
    "OutputError",
    "ParityResult",
    "PlanResult",
    "ProgramError",
    "QueueFullError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SeekforgeError",
    "ShapeError",
    "StructuredOutputsParams",
    "TargetError",
    "TokenLogprobs",
    "TrainResult",
    "Usage",
    "__version__",
    "build",
    "export",
    "parity",
    "plan",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from seekforge.common.requirements import own_version

        value: Any = own_version()
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'seekforge' has no attribute {name!r}; it has {', '.join(__all__)}")
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
