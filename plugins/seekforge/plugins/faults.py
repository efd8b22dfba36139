"""What goes wrong with this machine, told as an error of ours: a library that is missing, a full disk, no memory left.

The command line prints it as one line; functions that are called from Python raise it.
"""

from __future__ import annotations

import errno
import traceback

from seekforge.common.errors import EnvironmentFault, OutputError, SeekforgeError
from seekforge.common.requirements import install_module


def as_fault(error: BaseException, doing: str) -> SeekforgeError | None:
    """Return an error that says what this machine lacks, or None where it may be a bug of ours.

    Args:
        error: what was raised.
        doing: what was done, such as the name of the command.
    """
    if isinstance(error, ModuleNotFoundError):
        remedy = install_module(error.name or "")
        if not remedy:
            return None
        return EnvironmentFault(
            f"{doing}: the module {error.name!r} is not installed; {remedy} ('seekforge doctor' shows what else is "
            "missing)"
        )
    if isinstance(error, MemoryError):
        return EnvironmentFault("out of memory; use a smaller model, --max-model-len or cache")
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full; free space" if full else error.strerror
        return OutputError(f"{error.filename}: {reason}" if error.filename else str(reason))
    damaged = _damaged_module(error) if isinstance(error, (EOFError, ValueError)) else None
    if damaged is not None:
        return EnvironmentFault(
            f"{damaged}: this module as Python compiled it is damaged, as when the disk was full while it was written; "
            "delete the file and run again"
        )
    return None


def _damaged_module(error: BaseException) -> str | None:
    """Return the compiled form of a module that could not be imported because of it.

    Python writes what it has room for, and ends in an EOFError at each import from then on.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "get_code" and frame.f_code.co_filename.startswith("<frozen importlib"):
            return frame.f_locals.get("bytecode_path")
    return None
