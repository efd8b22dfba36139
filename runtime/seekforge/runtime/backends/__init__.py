"""What runs an engine's graphs: one module per library, imported when an engine asks for it."""

from __future__ import annotations

import importlib

from seekforge.common.errors import EngineError
from seekforge.runtime.backends.base import Backend, BackendFactory

#: manifest target.backend -> "module:class" of a `BackendFactory`.
BACKENDS: dict[str, str] = {
    "onnxruntime": "seekforge.runtime.backends.onnxruntime:OnnxRuntimeBackend",
    "tensorrt": "seekforge.runtime.backends.tensorrt.backend:TensorRtBackend",
    "tensorrt-rtx": "seekforge.runtime.backends.tensorrt.backend:TensorRtBackend",
}

#: manifest target.backend -> the extra that brings its library.
EXTRA_OF_BACKEND: dict[str, str] = {"onnxruntime": "cpu", "tensorrt-rtx": "rtx", "tensorrt": "trt"}
#: The same for engines that ONNX Runtime runs with a provider.
EXTRA_OF_PROVIDER: dict[str, str] = {"cuda": "ort-cuda"}


def extra_of(backend: str, provider: str | None) -> str:
    """Return the extra that brings what runs engines of a target."""
    return EXTRA_OF_BACKEND[backend] if provider is None else EXTRA_OF_PROVIDER[provider]


def backend_factory(name: str) -> BackendFactory:
    """Import and return the backend called `name`.

    Raises:
        EngineError: this version has no such backend.
    """
    if name not in BACKENDS:
        raise EngineError(
            f"the engine needs backend {name!r}, this seekforge runs {', '.join(sorted(BACKENDS))}; "
            "build the engine for another target or use a seekforge that has this backend"
        )
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def ranks_factory() -> BackendFactory:
    """Return the backend of engines of several ranks."""
    from seekforge.runtime.backends.ranks.backend import RanksBackend

    return RanksBackend


__all__ = [
    "BACKENDS",
    "EXTRA_OF_BACKEND",
    "Backend",
    "BackendFactory",
    "backend_factory",
    "extra_of",
    "ranks_factory",
]
