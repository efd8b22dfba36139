"""Who is told how a build goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class BuildProgress(Protocol):
    """What a build tells about its work; `common/cli/console.py:Stages` is one."""

    def __call__(self, stage: str) -> None:
        """Begin a stage."""
        ...

    def say(self, text: str) -> None:
        """Say what the user should know."""
        ...

    def bytes_bar(self, stage: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Begin a stage that is told the bytes that are done, and all."""
        ...

    def steps_bar(self, stage: str) -> AbstractContextManager[Callable[[float], None]]:
        """Begin a stage that is told the fraction that is done."""
        ...
