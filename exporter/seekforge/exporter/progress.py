"""How long commands show what they do: named stages on stderr, silent with --quiet or --json."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Stages:
    """Prints each stage with its seconds when the next one starts.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._current: tuple[str, float] | None = None
        self._status = None if quiet or not self._console.is_terminal else self._console.status("")
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str) -> None:
        """Close the stage before and start `stage`."""
        self.done()
        self._current = (stage, time.perf_counter())
        if self._status is not None:
            self._status.update(f"{stage} …")
            self._status.start()

    def done(self) -> None:
        """Close the last stage."""
        if self._current is None:
            return
        stage, start = self._current
        self.seconds[stage] = time.perf_counter() - start
        self._current = None
        if self._status is not None:
            self._status.stop()
        self._console.print(f"  [dim]{self.seconds[stage]:6.1f} s[/]  {stage}")

    def say(self, text: str) -> None:
        """Print a line between stages."""
        self.done()
        self._console.print(text)

    @contextmanager
    def bytes_bar(self, stage: str) -> Iterator[Callable[[int, int], None]]:
        """A bar with GB/s and time left; call what it yields with (bytes done, bytes in all)."""
        self(stage)
        if self._status is not None:
            self._status.stop()
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        show = self._console.is_terminal  # elsewhere it would leave an empty line
        with Progress(*columns, console=self._console, transient=True, disable=not show) as progress:
            task = progress.add_task(stage, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        self.done()

    @contextmanager
    def steps_bar(self, stage: str) -> Iterator[Callable[[float], None]]:
        """A bar for work without bytes; call what it yields with the fraction done."""
        self(stage)
        if self._status is not None:
            self._status.stop()
        columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        show = self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not show) as progress:
            task = progress.add_task(stage, total=1.0)
            yield lambda fraction: progress.update(task, completed=fraction)
        self.done()
