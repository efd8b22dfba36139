"""What is told of a process of the runtime that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.exporter.runtime_child import refusal

COPY = Path("copies/0")


@pytest.mark.parametrize(
    ("stderr", "code", "told"),
    [
        (f"warning: slow\nerror: {COPY}: no such tap\n", 2, "engine: no such tap"),
        ("Traceback\n  File\nMemoryError\n\n", 1, "MemoryError"),
        ("", -9, "exit code -9"),
        (" \n\n", 137, "exit code 137"),
    ],
    ids=["an error of ours, of a copy", "a traceback", "killed", "blank lines"],
)
def test_it_is_the_last_thing_that_was_said(stderr: str, code: int, told: str) -> None:
    assert str(refusal(COPY, "engine", stderr, code)) == f"engine: the runtime could not run it: {told}"
