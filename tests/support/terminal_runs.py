"""Commands in terminals of their own: with a size, a Ctrl-C at a stage, limits, closed streams; many, cheaply.

One process imports everything once and forks for each command, so that a run costs what the command does and not
what it imports. It is begun by `TerminalRuns`, speaks JSON by lines, and has no threads when it forks.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: A run that takes longer is killed.
_LONGEST_S = 300.0


@dataclass(frozen=True)
class Run:
    """What to run, and how.

    Attributes:
        args: the words after `seekforge`.
        folder: the working folder.
        environment: variables beside those of this process.
        columns: width of the terminal.
        interrupt_at: number of the stage during which it is interrupted; None: in none.
        interrupt_when: text of the output upon which it is interrupted; None: none.
        interrupt_after_s: how long after the stage began, or the text came.
        interrupt_by: SIGINT, to all its processes as Ctrl-C in a terminal, or SIGTERM, to itself as `kill` does.
        typed: what is typed into the terminal at once; None: its input is empty.
        file_bytes: largest file that may be written; None: any.
        limit_at: number of the stage from which on that holds; None: from the start.
        closed: streams that are closed: 1, 2.
        pipes: whether output goes to pipes in place of a terminal.
    """

    args: Sequence[str]
    folder: str
    environment: dict[str, str] = field(default_factory=dict)
    columns: int = 80
    interrupt_at: int | None = None
    interrupt_when: str | None = None
    interrupt_after_s: float = 0.0
    interrupt_by: str = "SIGINT"
    typed: str | None = None
    file_bytes: int | None = None
    limit_at: int | None = None
    closed: Sequence[int] = ()
    pipes: bool = False


@dataclass(frozen=True)
class Done:
    """How it ended.

    Attributes:
        code: the exit status, negative for a signal.
        output: all that came to the terminal.
        stages: the stages that began.
        seconds: from the interrupt, or the start, to the end.
    """

    code: int
    output: str
    stages: list[str]
    seconds: float


class TerminalRuns:
    """The process that forks."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.terminal_runs", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def run(self, one: Run) -> Done:
        """Run a command to its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(one)) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _serve(modules: Sequence[str]) -> None:
    for module in ("seekforge.runtime.cli.main", *modules):
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
    for line in sys.stdin:
        done = _run(Run(**json.loads(line)))
        sys.stdout.write(json.dumps(asdict(done)) + "\n")
        sys.stdout.flush()


def _run(one: Run) -> Done:
    ours, theirs = os.pipe() if one.pipes else os.openpty()
    if not one.pipes:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, one.columns, 0, 0))
    told, tells = os.pipe()  # names of stages, and when it was interrupted
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(ours)
        os.close(told)
        _become(one, theirs, tells)
    os.close(theirs)
    os.close(tells)
    if one.typed is not None:
        os.write(ours, one.typed.encode())
    output, news, interrupted = _collected(one, (ours, told), child, began + _LONGEST_S)
    _, status = os.waitpid(child, 0)
    ended = time.monotonic()
    lines = [json.loads(line) for line in news.decode().splitlines()]
    interrupts = [line["interrupt"] for line in lines if "interrupt" in line] + interrupted
    return Done(
        code=os.waitstatus_to_exitcode(status),
        output=output.decode("utf-8", "replace"),
        stages=[line["stage"] for line in lines if "stage" in line],
        seconds=ended - (interrupts[0] if interrupts else began),
    )


def _collected(one: Run, sources: tuple[int, int], child: int, until: float) -> tuple[bytes, bytes, list[float]]:
    """Return what came to the terminal, what was told, and when the child was interrupted upon its output."""
    found = dict.fromkeys(sources, b"")
    waiting, interrupted = set(sources), []
    marker, due = None if one.interrupt_when is None else one.interrupt_when.encode(), None
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, (due or until) - time.monotonic()))
        if due is not None and time.monotonic() >= due:
            due = None
            interrupted.append(time.monotonic())
            _interrupt(one, child)
        elif not ready:
            os.killpg(child, signal.SIGKILL)
            until += 10
        for source in ready:
            try:
                block = os.read(source, 65536)
            except OSError:  # the other end of a terminal is closed
                block = b""
            found[source] += block
            if marker is not None and marker in found[sources[0]]:
                marker, due = None, time.monotonic() + one.interrupt_after_s
            if not block:
                waiting.remove(source)
                os.close(source)
    return found[sources[0]], found[sources[1]], interrupted


def _interrupt(one: Run, child: int) -> None:
    """Send the signal to a child, which leads its group; a Ctrl-C goes to all of that."""
    (os.killpg if one.interrupt_by == "SIGINT" else os.kill)(child, getattr(signal, one.interrupt_by))


def _become(one: Run, terminal: int, tells: int) -> None:
    """Run the command in this process, which ends with it."""
    code: Any = 70
    try:
        os.setsid()
        if not one.pipes:
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        os.dup2(terminal if one.typed is not None else os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(terminal, stream)
        sys.stdin = os.fdopen(0, closefd=False)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, None if stream in one.closed else os.fdopen(stream, "w", 1, closefd=False))
            if stream in one.closed:
                os.close(stream)
        os.chdir(one.folder)
        os.environ.update({"TERM": "xterm-256color"} | one.environment)
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            if name not in one.environment:
                os.environ.pop(name, None)
        if one.limit_at is None:
            _limit(one.file_bytes)
        _tell_stages(one, tells)
        from seekforge.runtime.cli import main as cli

        try:
            cli.main(list(one.args))
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
    finally:
        os._exit(code if isinstance(code, int) else 71)


def _limit(file_bytes: int | None) -> None:
    """Let no file of this process and those that it starts grow beyond that, and compile no module: it would be cut."""
    if file_bytes is not None:
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def _tell_stages(one: Run, tells: int) -> None:
    """Report each stage that begins; interrupt the one that is asked for, with all its processes, or limit files."""
    from seekforge.common.cli.console import Stages

    begin = Stages.__call__
    count = 0

    def tell(**news: object) -> None:
        os.write(tells, json.dumps(news).encode() + b"\n")

    def interrupt() -> None:
        tell(interrupt=time.monotonic())
        _interrupt(one, os.getpid())

    def call(self: Stages, stage: str) -> None:
        nonlocal count
        begin(self, stage)
        tell(stage=stage)
        if count == one.limit_at:
            _limit(one.file_bytes)
        if count == one.interrupt_at:
            timer = threading.Timer(one.interrupt_after_s, interrupt)
            timer.daemon = True
            timer.start()
        count += 1

    Stages.__call__ = call


if __name__ == "__main__":
    _serve(sys.argv[1:])
