"""What a process of the runtime said when it could not do a part of the exporter's work."""

from __future__ import annotations

from pathlib import Path

from seekforge.common.errors import EngineError


def refusal(engine: Path, called: str, stderr: str, code: int) -> EngineError:
    """Return the error to raise for a process that failed on an engine, in the words that end its output.

    Args:
        engine: the folder that the process was given; it may be a copy that is gone by now.
        called: what messages call the engine in its place.
        stderr: all that the process wrote there.
        code: its exit code, told where it wrote nothing.
    """
    lines = stderr.strip().splitlines()
    line = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
    return EngineError(f"{called}: the runtime could not run it: {line.replace(str(engine), called)}")
