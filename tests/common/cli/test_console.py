"""Tables say everything at any width; markup is text; what is shown in place ends on every way out."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from seekforge.common.cli.console import Column, Console, Table, console, styled

HOSTILE = "a[/x]b[bold]\x1b[31m\x1b]0;t\x07\u202e:smile:\x9b1m\ud800"
SHOWN = r"a[/x]b[bold]\x1b[31m\x1b]0;t\x07\u202e:smile:\x9b1m\ud800"


def on_terminal(width: int) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    made = Console(file=file, force_terminal=True, width=width, markup=False, emoji=False, highlight=False)
    return made, file


def plain(file: io.StringIO) -> str:
    """What was printed, without our own styles; nothing else that acts may be in it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text), repr(text)
    return text


def example(lines: bool) -> Table:
    columns = [Column("name", "words"), Column("max context", "number"), Column("tok/s", "number"), Column("why")]
    table = Table(columns, title=HOSTILE, caption=HOSTILE, lines=lines)
    table.add("rtx-pro-6000-blackwell-server-edition", "160K", "1,234,567.25", "because it is so " * 3)
    table.add(HOSTILE, "94.333", "7", (HOSTILE, "bold"))
    return table


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_no_number_is_cut_and_no_name_is_lost_at_any_width(width: int, lines: bool) -> None:
    out, file = on_terminal(width)
    out.print(example(lines))
    text = plain(file)
    assert "…" not in text
    for number in ("160K", "1,234,567.25", "94.333"):
        assert re.search(rf"(?<![\w.]){re.escape(number)}(?![\w.])", text), (number, text)
    letters = re.sub(r"[\s│┃]", "", text)
    if width >= 120:
        assert "rtx-pro-6000-blackwell-server-edition" in text and SHOWN in text
    for part in ("rtx-pro-6000", "becauseitisso"):
        assert part in letters or width < 80
    assert all(len(line) <= width for line in text.splitlines())


def test_text_is_text_wherever_it_stands() -> None:
    out, file = on_terminal(400)
    out.print(HOSTILE)
    out.print(styled("x ", (HOSTILE, "red")))
    with out.status(styled(HOSTILE)):
        pass
    assert plain(io.StringIO(re.sub(r"\x1b\[(\?25[lh]|2K|1A|\d*[A-D])|\r", "", file.getvalue()))).count(SHOWN) >= 2


def test_a_newline_in_a_name_does_not_begin_a_line() -> None:
    out, file = on_terminal(80)
    out.print("one\nerror: two")
    assert plain(file).splitlines() == ["one\\nerror: two"]


def test_output_that_is_no_terminal_is_not_wrapped() -> None:
    file = io.StringIO()
    out = console(file=file)
    out.print("word " * 200)
    table = Table([Column("name"), Column("n", "number")])
    table.add("long name " * 50, "1")
    out.print(table)
    assert ("word " * 200).strip() in file.getvalue() and ("long name " * 50).strip() in file.getvalue()


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table([Column("a"), Column("b")]).add("x")


SCRIPT = """
import os, signal, sys, time
import click
from seekforge.common.cli.options import command
from seekforge.common.cli.console import Stages
from seekforge.common.errors import OutputError
from seekforge.runtime.cli import main as cli

@command("export", examples=("x",))
@click.argument("how")
def slow(how):
    stages = Stages()
    stages("work")
    time.sleep(0.2)
    if how == "bar":
        with stages.bytes_bar("bytes") as bar:
            bar(1, 2)
            raise OutputError("no")
    if how == "begins":
        from rich.progress import Progress
        start = Progress.start
        def interrupted(self):
            start(self)
            raise KeyboardInterrupt
        Progress.start = interrupted  # when the cursor is hidden and before the block is entered
        with stages.bytes_bar("bytes"):
            pass
    if how == "error":
        raise OutputError("no")
    if how == "bug":
        raise ValueError("bug")
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(5)

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell is begun without
cli.LazyGroup.get_command = lambda self, ctx, name: slow
cli.main(["export", sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("how", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("error", 2), ("bar", 2), ("bug", 1), ("begins", 130)]
)
def test_the_cursor_comes_back_on_every_way_out(how: str, code: int) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how], stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        seen += block
    assert process.wait() == code, seen
    hidden, back = seen.rfind(b"\x1b[?25l"), seen.rfind(b"\x1b[?25h")
    assert 0 <= hidden < back, seen
    if code == 2:
        assert seen.rstrip().splitlines()[-1].endswith(b"error: no")
