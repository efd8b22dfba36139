"""The public names of `seekforge`.

Each is imported when it is first used: a server imports the runtime without torch, a build without the runtime.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seekforge.common.errors import (
        ConfigError,
        EngineError,
        EnvironmentFault,
        OutputError,
        RequestError,
        SeekforgeError,
    )
    from seekforge.runtime import (
        LLM,
        AsyncLLM,
        CompletionOutput,
        Engine,
        GenerationError,
        RequestOutput,
        SamplingParams,
        StructuredOutputsParams,
    )

# A library is silent unless the program that uses it listens: to the logger "seekforge", and those below it.
logging.getLogger("seekforge").addHandler(logging.NullHandler())

__version__: str

_HOMES = {
    "seekforge.runtime": (
        "LLM",
        "AsyncLLM",
        "CompletionOutput",
        "Engine",
        "GenerationError",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutputsParams",
    ),
    "seekforge.common.errors": (
        "ConfigError",
        "EngineError",
        "EnvironmentFault",
        "OutputError",
        "RequestError",
        "SeekforgeError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineError",
    "EnvironmentFault",
    "GenerationError",
    "OutputError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SeekforgeError",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("seekforge")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'seekforge' has no attribute {name!r}; it has {', '.join(__all__)}")
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
