"""Find the compiled library of CPU operators, and give it to a session of ONNX Runtime."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import EngineError
from seekforge.plugins.native.compile import library_path

#: Set to 0, sessions run the bodies in standard operators: to compare, or where the library is at fault.
SWITCH: Final = "SEEKFORGE_CPU_OPERATORS"


@functools.cache
def compiled() -> Path | None:
    """Return the library that these sources were compiled to; None where there is none."""
    path = library_path()
    return path if path.is_file() else None


def absence() -> str:
    """Return why sessions run without the library; empty where they run with it."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches them off"
    return "" if compiled() else "they are compiled when seekforge is installed where a C++ compiler is"


def add_operators(options: Any) -> bool:
    """Register the operators with an `onnxruntime.SessionOptions`; returns whether there are any.

    Raises:
        EngineError: the library cannot be loaded here.
    """
    path = compiled()
    if path is None or absence():
        return False
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        reason = " ".join(str(error).split())
        raise EngineError(
            f"{path}: the CPU operators cannot be loaded ({reason}); install seekforge again, or set {SWITCH}=0"
        ) from error
    return True


def keep_row_bits(on: bool) -> None:
    """Ask that a row gives the same bits among any number of rows but one, in all sessions of this process; or no more.

    Who asks says later that it is over; until all have, few rows take the way of many, which is slower.
    """
    path = compiled()
    if path is not None and not absence():
        ctypes.CDLL(str(path)).SeekforgeKeepRowBits(1 if on else -1)
