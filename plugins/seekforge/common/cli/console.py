"""Styled output: the one rich console, its tables and its progress. Import it where something is printed, not before.

Three promises that rich does not make by itself. Text is text: no markup, no emoji codes, and every active character is
shown (`terminal.shown`), in strings, styled texts, cells and titles alike. Numbers are never cut: a table that is too
wide folds its words, and where that is not enough it becomes one block per row. Output that is no terminal is not
wrapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console as _Console
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table as _Table
from rich.text import Text

from seekforge.common.cli.terminal import shown

#: Columns of what is no terminal: no line of ours is longer.
_UNBOUNDED = 100_000
#: A column of words is not folded below this width.
_LEAST_WORDS = 14

#: A piece of text: as it is, or with a style of rich.
Piece = str | tuple[str, str]


def styled(*pieces: Piece) -> Text:
    """Return one text of pieces, each plain or (text, style); what they say is shown and never obeyed."""
    text = Text()
    for piece in pieces:
        content, style = (piece, "") if isinstance(piece, str) else piece
        text.append(shown(content), style or None)
    return text


class Console(_Console):
    """A rich console for foreign text. Made by `console`."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; a string is one line, in which even a newline is shown."""
        options.setdefault("soft_wrap", not self.is_terminal or None)
        super().print(*(Text(shown(one)) if isinstance(one, str) else one for one in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render; the last gate for text that came here by another way than `styled`."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(shown(segment.text, keep="\n"), segment.style)


def console(*, err: bool = False, quiet: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console on stdout, or stderr: no markup, no highlighting, as wide as it needs where nobody looks."""
    made = Console(stderr=err, quiet=quiet, file=file, markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made.width = _UNBOUNDED
    return made


@dataclass(frozen=True)
class Column:
    """One column of a `Table`.

    Attributes:
        name: the head of the column, folded between words.
        kind: "number" is set to the right and "code" to the left, and neither is ever broken; "words" may be folded.
    """

    name: str
    kind: Literal["number", "code", "words"] = "words"


@dataclass
class Table:
    """A table that says everything at any width.

    Attributes:
        columns: the columns from the left. The first names the row where it must become a block.
        title, caption: text above and below the table.
        lines: whether it is drawn with a frame; else with a line under its head.
        rows: cells, each text or a list of pieces for `styled`.
    """

    columns: Sequence[Column]
    title: str = ""
    caption: str = ""
    lines: bool = False
    rows: list[list[Text]] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)

    def add(self, *cells: Piece | Text, end_section: bool = False) -> None:
        """Add a row; `end_section` draws a line below it where there is a frame."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        if end_section:
            self.ends.add(len(self.rows))
        self.rows.append([cell if isinstance(cell, Text) else styled(cell) for cell in cells])

    def __rich_console__(self, console: _Console, options: ConsoleOptions) -> RenderResult:
        """Draw it as a table where that fits, else one block per row."""
        between = 3 * len(self.columns)
        room = options.max_width - (between + 1 if self.lines else between - 3)
        widths = self._widths(room)
        if self.title:
            yield styled((self.title, "italic"))
        if widths is None:
            yield from self._blocks()
        else:
            yield self._drawn(widths)
        if self.caption:
            yield styled((self.caption, "dim italic"))

    def _widths(self, room: int) -> list[int] | None:
        """Return the width of each column, or None where numbers would have to be cut."""
        full, least = [], []
        for index, column in enumerate(self.columns):
            cells = max((cell_len(row[index].plain) for row in self.rows), default=0)
            head, word = cell_len(column.name), max(map(cell_len, column.name.split()), default=0)
            full.append(max(cells, head))
            least.append(max(word, min(cells, _LEAST_WORDS) if column.kind == "words" else cells))
        if sum(full) <= room:
            return full
        spare = room - sum(least)
        if spare < 0:
            return None
        wanted = [f - n for f, n in zip(full, least)]
        # heads over numbers fold last: a share for each column by what it lacks
        total = sum(wanted)
        return [n + spare * want // total for n, want in zip(least, wanted)]

    def _drawn(self, widths: Sequence[int]) -> _Table:
        table = _Table(box=box.HEAVY_HEAD if self.lines else box.SIMPLE_HEAD, show_edge=self.lines, pad_edge=self.lines)
        for column, width in zip(self.columns, widths):
            justify = "right" if column.kind == "number" else "left"
            table.add_column(styled(column.name), justify=justify, width=width, overflow="fold")
        for number, row in enumerate(self.rows):
            table.add_row(*row, end_section=number in self.ends)
        return table

    def _blocks(self) -> Iterator[Text]:
        width = max(len(column.name) for column in self.columns[1:])
        for row in self.rows:
            yield Text.assemble((self.columns[0].name + " " if self.columns[0].name else "", "dim"), row[0])
            for column, cell in zip(self.columns[1:], row[1:]):
                if cell.plain:
                    yield Text.assemble((f"  {column.name:<{width}}  ", "dim"), cell)


class Stages:
    """Prints each stage with its seconds when the next one starts. What it shows of a stage that lasts ends with it.

    Inside a command, whatever way that ends, the cursor comes back.

    Args:
        quiet: print nothing.
        listener: called with each stage and each line between stages.

    Attributes:
        quiet: whether nothing is shown.
        seconds: the time of each stage that is over.
    """

    def __init__(self, *, quiet: bool = False, listener: Callable[[str], object] | None = None) -> None:
        self.quiet = quiet
        self._listener = listener
        self._console = console(err=True, quiet=quiet)
        self._current: tuple[str, float] | None = None
        spinner = "line" if self._console.options.ascii_only else "dots"
        show = self._console.is_terminal and not quiet
        self._status = self._console.status("", spinner=spinner) if show else None
        self.seconds: dict[str, float] = {}
        context = click.get_current_context(silent=True)
        if context is not None:
            context.call_on_close(self._close)

    def __call__(self, stage: str) -> None:
        """Close the stage before and start `stage`."""
        self.done()
        self._current = (stage, time.perf_counter())
        if self._listener is not None:
            self._listener(stage)
        if self._status is not None:
            self._status.update(styled(f"{stage} …"))
            self._status.start()

    def update(self, text: str) -> None:
        """Say more of the stage that lasts, in its place."""
        if self._status is not None:
            self._status.update(styled(text))

    def done(self, line: str | None = None) -> None:
        """Close the last stage; say `line` of it where given."""
        if self._current is None:
            return
        stage, start = self._current
        self.seconds[stage] = seconds = time.perf_counter() - start
        self.stop()
        if line is None:
            self._console.print(styled((f"  {seconds:6.1f} s", "dim"), f"  {stage}"))
        else:
            self._console.print(styled(line, (f" ({seconds:.2f} s)", "dim")))

    def stop(self) -> None:
        """End what is shown in place, and say nothing."""
        self._current = None
        if self._status is not None:
            self._status.stop()

    def _close(self) -> None:
        """End what is shown, and show the cursor: an interrupt while a bar begins leaves nobody who would."""
        self.stop()
        if self._status is not None:
            self._console.show_cursor(True)

    def say(self, text: str) -> None:
        """Print a line between stages."""
        self.done()
        if self._listener is not None:
            self._listener(text)
        self._console.print(text)

    @contextmanager
    def bytes_bar(self, stage: str, *, closes: bool = True) -> Iterator[Callable[[int, int], None]]:
        """A bar with GB/s and time left; call what it yields with (bytes done, bytes in all).

        Args:
            stage: the name of the stage.
            closes: close the stage with the bar; else who goes on says of it what `done` prints.
        """
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with self._bar(stage, columns, None) as (progress, task):
            yield lambda done, total: progress.update(task, completed=done, total=total)
        if closes:
            self.done()

    @contextmanager
    def steps_bar(self, stage: str) -> Iterator[Callable[[float], None]]:
        """A bar for work without bytes; call what it yields with the fraction done."""
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with self._bar(stage, columns, 1.0) as (progress, task):
            yield lambda fraction: progress.update(task, completed=fraction)
        self.done()

    @contextmanager
    def _bar(
        self, stage: str, columns: Sequence[ProgressColumn], total: float | None
    ) -> Iterator[tuple[Progress, Any]]:
        self(stage)
        if self._status is not None:
            self._status.stop()
        with bar(self._console, *columns) as progress:
            yield progress, progress.add_task(shown(stage), total=total)


def bar(console: Console, *columns: ProgressColumn) -> Progress:
    """Return a progress bar after the name of its task; where nobody looks it shows nothing."""
    first = TextColumn("  {task.description}", markup=False)
    disable = console.quiet or not console.is_terminal  # elsewhere it would leave an empty line
    return Progress(first, *columns, console=console, transient=True, disable=disable)
