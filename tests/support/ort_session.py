"""Sessions of ONNX Runtime as tests open them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort


def open_session(model: Path | bytes, library: Path | None = None) -> ort.InferenceSession:
    """Open a model with one thread: the library would take all cores of the machine, and wait for each other's.

    Args:
        model: its file, or what that holds.
        library: operators that it needs beside ONNX Runtime's.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, ["CPUExecutionProvider"])
