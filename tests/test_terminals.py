"""Commands in a terminal: Ctrl-C in every stage, narrow and dumb terminals, limits of files; nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.lm_eval_tasks import TASKS, write_tasks
from tests.support.random_nano import random_nano_checkpoint
from tests.support.terminal_runs import Done, Run, TerminalRuns

from seekforge.formats.dump import Dump

#: What commands import when they are called: imported once for all of them, torch only for those that need it.
_LIGHT = ("onnxruntime", "tokenizers", "rich.live", "seekforge.runtime.llm", "seekforge.exporter.planner.cli")
_HEAVY = (
    "torch", "onnx", *_LIGHT, "seekforge.exporter.program.export", "seekforge.exporter.builder.onnxruntime.build",
    "seekforge.exporter.parity.api", "seekforge.exporter.training.start", "seekforge.exporter.checkpoint.cli",
)  # fmt: skip
_WITHOUT_TORCH = ("run", "batch", "bench", "dump", "plan", "chat", "serve")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")


@pytest.fixture(scope="module")
def light_runs() -> Iterator[TerminalRuns]:
    with closing(TerminalRuns(_LIGHT)) as made:
        yield made


@pytest.fixture(scope="module")
def heavy_runs() -> Iterator[TerminalRuns]:
    with closing(TerminalRuns(_HEAVY)) as made:
        yield made


@pytest.fixture
def runs(name: str, request: pytest.FixtureRequest) -> TerminalRuns:
    """What runs the command `name`."""
    return request.getfixturevalue("light_runs" if name in _WITHOUT_TORCH else "heavy_runs")


class Place:
    """A working folder and a folder for temporary files; what is in them is counted."""

    def __init__(self, root: Path) -> None:
        self.work, self.temporary = root / "work", root / "tmp"
        for folder in (self.work, self.temporary):
            folder.mkdir()

    def run(self, runs: TerminalRuns, *args: object, **how: object) -> Done:
        environment = {"TMPDIR": str(self.temporary), "HOME": str(self.temporary), **how.pop("environment", {})}  # type: ignore
        return runs.run(Run(tuple(map(str, args)), str(self.work), environment, **how))  # type: ignore

    def left(self) -> list[str]:
        names = [path for folder in (self.work, self.temporary) for path in folder.iterdir()]
        return sorted(path.name for path in names if path.name != ".cache")

    def clear(self) -> None:
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def cursor_is_shown(output: str) -> bool:
    """Whether the last word about the cursor is that it be shown."""
    return output.rfind("\x1b[?25l") <= output.rfind("\x1b[?25h")


# --- Ctrl-C and SIGTERM -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What commands take: the folders of the tiny model, and nano's checkpoint."""

    checkpoint: Path
    program: Path
    fp8_program: Path
    engine: Path
    nano: Path


@pytest.fixture
def made(
    tiny_checkpoint: Path,
    tiny_programs: dict[str, Path],
    tiny_engines: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    nano = random_nano_checkpoint(tmp_path_factory)
    return Made(tiny_checkpoint, tiny_programs["exact"], tiny_programs["fp8"], tiny_engines["exact"], nano)


def commands(made: Made) -> dict[str, tuple[object, ...]]:
    """Each command that has stages and ends by itself."""
    parity = ("parity", made.engine, "--checkpoint", made.checkpoint, "--contexts", "10", "--modes", "whole", "--brief")
    return {
        "run": ("run", made.engine, "--prompt", "Hello", "--max-tokens", "200", "--greedy"),
        "batch": ("run", made.engine, "--batch", "in.jsonl", "--output", "out.jsonl"),
        "dump": ("dump", made.engine, "out", "--contexts", "100"),
        "new-checkpoint": ("new-checkpoint", "out"),
        "export": ("export", made.checkpoint, "out", "--layers", "1-1", "--numerics", "exact"),
        "build": ("build", made.program, "out", "--target", "cpu", "--checkpoint", made.checkpoint),
        "build for a GPU": (
            "build", made.fp8_program, "out", "--target", "rtx4090", "--checkpoint", made.checkpoint,
        ),
        "parity": (*parity, "--save", "out", "--html", "out.html"),
        "train": (
            "train", "out", "--checkpoint", made.nano, "--data", "examples.jsonl", "--steps", "2", "--threads", "1",
        ),
        "eval": ("eval", made.engine, "--tasks", "words_choice", "--include-path", "tasks", "--output", "out"),
        "chat": ("chat", made.engine, "--max-tokens", "20", "--no-thinking"),
        "serve": ("serve", made.engine, "--port", "0", "--threads", "1"),
    }  # fmt: skip


#: Where a stage costs little, it is also interrupted when it begins and later.
_LIGHT_COMMANDS = ("run", "batch", "new-checkpoint", "chat")
#: What a command keeps of work that was interrupted, to go on with.
_KEPT = {
    "batch": {"out.jsonl"},
    "build for a GPU": {".out.parts", "out.build.log"},
    "train": {"out.state"},
    "eval": {"out"},
}
_ENDS = {"SIGINT": 130, "SIGTERM": 143}


def inputs(place: Place) -> None:
    """Write what commands read."""
    (place.work / "in.jsonl").write_text('{"prompt": "Hello", "max_tokens": 100, "ignore_eos": true}\n' * 3)
    (place.work / "examples.jsonl").write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n' * 4)
    write_tasks(place.work / "tasks", 9, {"words_choice": TASKS["words_choice"]})


_INPUTS = {"in.jsonl", "examples.jsonl", "tasks"}


def running(place: Place) -> list[str]:
    """Return the processes that have this place's folder of temporary files, other than those that end just now."""
    until = time.monotonic() + 5
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"TMPDIR={place.temporary}".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        found = [one for one in found if one]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.05)


def check_end(name: str, place: Place, done: Done, code: int, what: object) -> None:
    """Check that an interrupted command ended at once and cleanly, and left what it goes on with, and no more."""
    plain = _ESCAPE.sub("", done.output)
    assert done.code == code and "Traceback" not in plain and "error:" not in plain, what
    assert cursor_is_shown(done.output), what
    assert done.seconds < 30, what
    assert running(place) == [], what
    left = set(place.left()) - _INPUTS
    assert left <= _KEPT.get(name, set()), what
    if name == "batch" and left:  # grows by whole lines
        text = (place.work / "out.jsonl").read_text()
        assert text == "" or (text.endswith("\n") and [json.loads(line) for line in text.splitlines()]), what


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", _ENDS)
@pytest.mark.parametrize("name", commands(Made(*[Path()] * 5)))
def test_an_interrupt_in_any_stage_leaves_nothing_half_written(
    name: str, number: str, runs: TerminalRuns, place: Place, made: Made
) -> None:
    """The cursor is there again, and the exit code says why; of what was asked nothing stands there in part."""
    if name == "eval":
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    if name == "build for a GPU":
        pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed")
    args = commands(made)[name]
    inputs(place)
    how: dict[str, object] = {"typed": "Hello\n/quit\n"} if name == "chat" else {}
    if name == "serve":
        how = {"interrupt_when": "serving ", "interrupt_by": number}
    whole = place.run(runs, *args, **how)
    assert whole.code == 0, whole.output
    assert whole.stages and cursor_is_shown(whole.output)
    ended = 0
    for at, stage in enumerate(whole.stages):
        for after_s in (0.0, 0.05, 0.15) if name in _LIGHT_COMMANDS else (0.02,):
            place.clear()
            inputs(place)
            done = place.run(
                runs, *args, **how | {"interrupt_when": None, "interrupt_by": number}, interrupt_at=at,
                interrupt_after_s=after_s,
            )  # fmt: skip
            if done.code == 0 and after_s:
                continue  # it was over before
            check_end(name, place, done, _ENDS[number], (stage, after_s, done.output[-2000:]))
            ended += 1
    assert ended


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["chat"])
@pytest.mark.parametrize("typed", ["", "Hello\n"])
def test_a_chat_that_is_terminated_ends(name: str, typed: str, runs: TerminalRuns, place: Place, made: Made) -> None:
    """While it waits for a line and while it answers, where Ctrl-C is no end of it."""
    args = ("chat", made.engine, "--max-tokens", "4000", "--no-thinking")
    done = place.run(
        runs, *args, typed=typed, interrupt_when="> ", interrupt_after_s=0.3, interrupt_by="SIGTERM"
    )  # fmt: skip
    check_end(name, place, done, 143, done.output[-2000:])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", _ENDS)
@pytest.mark.parametrize("after_s", [0.0, 3.0])
def test_an_interrupt_ends_every_compiler_of_kernels(
    after_s: float, number: str, heavy_runs: TerminalRuns, place: Place
) -> None:
    """While processes begin and while they compile. What was compiled is kept, in the folder of images alone."""
    args = ("kernels", "build", "out", "--sm", "80,89,90", "--op", "DsaIndexer", "--cache", "images")
    done = place.run(
        heavy_runs, *args, interrupt_when="compile", interrupt_after_s=after_s, interrupt_by=number
    )  # fmt: skip
    plain = _ESCAPE.sub("", done.output)
    assert done.code == _ENDS[number] and "Traceback" not in plain and "Process Spawn" not in plain, plain[-2000:]
    assert cursor_is_shown(done.output) and done.seconds < 30 and running(place) == []
    assert set(place.left()) <= {"images"}


# --- files of bounded size ----------------------------------------------------------------------------------------


def writers(made: Made) -> dict[str, tuple[object, ...]]:
    """Each command that writes, on something small."""
    names = ("new-checkpoint", "batch", "dump", "export", "build", "parity", "train", "eval")
    parity = ("parity", made.engine, "--checkpoint", made.checkpoint, "--contexts", "10", "--modes", "whole", "--brief")
    return {name: commands(made)[name] for name in names} | {
        "parity with transformers": (*parity, "--against", "transformers"),
        "plan": ("plan", made.checkpoint, "--chart", "out.svg"),
        "bench": (
            "bench", made.engine, "--contexts", "8", "--concurrency", "1", "--max-tokens", "4", "--chart", "out.png",
        ),
    }  # fmt: skip


def check_refusal(name: str, place: Place, done: Done) -> None:
    """Check that a command that could not write said so in one line, and left what it goes on with, and no more."""
    plain = _ESCAPE.sub("", done.output).replace("\r", "\n")
    errors = [line for line in plain.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(errors) == 1 and "Traceback" not in plain, plain[-3000:]
    assert "File too large" in errors[0] or "file too large" in errors[0], errors
    assert cursor_is_shown(done.output)
    assert running(place) == []
    left = set(place.left()) - _INPUTS
    if name == "parity" and left == {"out"}:  # the page alone could not be written
        assert "(the dumps are whole, in out: --from-dump compares them again)" in errors[0]
        assert all(Dump.open(place.work / "out" / side).cases for side in ("judged", "reference"))
        return
    assert left <= _KEPT.get(name, set()), plain[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file_bytes", [200, 20_000])
@pytest.mark.parametrize("name", writers(Made(*[Path()] * 5)))
def test_a_file_that_cannot_grow_is_one_line(
    name: str, file_bytes: int, runs: TerminalRuns, place: Place, made: Made
) -> None:
    """As on a full disk, or under a quota: the limit of the system (`ulimit -f`)."""
    if name == "eval":
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    inputs(place)
    done = place.run(runs, *writers(made)[name], file_bytes=file_bytes)
    if done.code or file_bytes == 200:  # else nothing that it writes is as large
        check_refusal(name, place, done)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["new-checkpoint", "dump", "export", "build", "parity", "train"])
def test_a_disk_that_fills_in_any_stage_is_one_line(name: str, runs: TerminalRuns, place: Place, made: Made) -> None:
    """From a stage on no file grows: what was written until then goes, too."""
    args = writers(made)[name]
    inputs(place)
    whole = place.run(runs, *args)
    assert whole.code == 0 and whole.stages, whole.output
    refused = 0
    for at in range(len(whole.stages)):
        place.clear()
        inputs(place)
        done = place.run(runs, *args, file_bytes=100, limit_at=at)
        if done.code == 0:  # all was written before
            continue
        check_refusal(name, place, done)
        refused += 1
    assert refused


# --- narrow, dumb and colorless -----------------------------------------------------------------------------------


def printing(checkpoint: Path, program: Path, engine: Path) -> dict[str, tuple[object, ...]]:
    """Each command that prints more than a line."""
    helped: dict[str, tuple[object, ...]] = {f"{one} --help": (one, "--help") for one in ("plan", "targets", "inspect")}
    return helped | {
        "plan": ("plan", "full"),
        "targets": ("targets",),
        "inspect checkpoint": ("inspect", checkpoint),
        "inspect program": ("inspect", program),
        "inspect engine": ("inspect", engine),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", printing(*[Path()] * 3))
def test_a_terminal_is_obeyed(
    name: str, light_runs: TerminalRuns, place: Place, tiny_checkpoint: Path, tiny_programs: dict[str, Path],
    tiny_engines: dict[str, Path],
) -> None:  # fmt: skip
    args = printing(tiny_checkpoint, tiny_programs["fp8"], tiny_engines["fp8"])[name]
    wide = place.run(light_runs, *args, columns=200)
    assert wide.code == 0, wide.output
    for columns in (40, 80):
        done = place.run(light_runs, *args, columns=columns)
        assert done.code == 0 and cursor_is_shown(done.output)
        plain = _ESCAPE.sub("", done.output)
        assert "…" not in re.sub(r" …|,…|…]|[A-Z]…", "", plain), f"{columns} columns: {plain}"
        numbers = set(re.findall(r"\d[\d,.]*", _ESCAPE.sub("", wide.output)))
        if "--help" not in args and columns == 80:
            lost = numbers - set(re.findall(r"\d[\d,.]*", plain))
            assert not lost, f"{columns} columns: {lost}\n{plain}"
    dumb = place.run(light_runs, *args, environment={"TERM": "dumb"})
    assert dumb.code == 0 and "\x1b" not in dumb.output, repr(dumb.output[:3000])
    colorless = place.run(light_runs, *args, environment={"NO_COLOR": "1"})
    colors = [one for one in re.findall(r"\x1b\[([0-9;]*)m", colorless.output) if re.search(r"(?:^|;)[349]\d", one)]
    assert colorless.code == 0 and not colors
    piped = place.run(light_runs, *args, pipes=True)
    assert piped.code == 0 and "\x1b" not in piped.output


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_a_closed_stream_is_no_traceback(
    closed: tuple[int, ...], light_runs: TerminalRuns, place: Place, tiny_engines: dict[str, Path]
) -> None:
    args = ("run", tiny_engines["fp8"], "--prompt", "Hello", "--max-tokens", "2", "--greedy")
    done = place.run(light_runs, *args, closed=closed)
    assert done.code in (0, 1) and "Traceback" not in done.output, done.output
    assert not list(place.work.iterdir())
