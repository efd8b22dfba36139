"""Commands in a terminal: Ctrl-C in every stage, narrow and dumb terminals, limits of files; nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.terminal_runs import Done, Run, TerminalRuns

#: What commands import when they are called: imported once for all of them, torch only for those that need it.
_LIGHT = ("onnxruntime", "tokenizers", "rich.live", "seekforge.runtime.llm", "seekforge.exporter.planner.cli")
_HEAVY = (
    "torch", "onnx", *_LIGHT, "seekforge.exporter.program.export", "seekforge.exporter.builder.onnxruntime.build",
    "seekforge.exporter.parity.api", "seekforge.exporter.training.start", "seekforge.exporter.checkpoint.cli",
)  # fmt: skip
_WITHOUT_TORCH = ("run", "batch", "bench", "dump", "plan")
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


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def commands(engine: Path) -> dict[str, tuple[object, ...]]:
    """Each command of the runtime that has stages and ends by itself."""
    return {
        "run": ("run", engine, "--prompt", "Hello", "--max-tokens", "200", "--greedy"),
        "batch": ("run", engine, "--batch", "in.jsonl", "--output", "out.jsonl"),
        "dump": ("dump", engine, "out", "--contexts", "100"),
    }


def inputs(place: Place) -> None:
    (place.work / "in.jsonl").write_text('{"prompt": "Hello", "max_tokens": 100, "ignore_eos": true}\n' * 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", commands(Path()))
def test_an_interrupt_in_any_stage_leaves_nothing_half_written(
    name: str, runs: TerminalRuns, place: Place, tiny_engines: dict[str, Path]
) -> None:
    """The cursor is there again, and the exit code says 130; of what was asked nothing stands there in part."""
    args = commands(tiny_engines["exact"])[name]
    inputs(place)
    whole = place.run(runs, *args)
    assert whole.code == 0, whole.output
    assert whole.stages and cursor_is_shown(whole.output)
    ended = 0
    for number, stage in enumerate(whole.stages):
        for after_s in (0.0, 0.15):
            place.clear()
            inputs(place)
            done = place.run(runs, *args, interrupt_at=number, interrupt_after_s=after_s)
            what = (stage, after_s, done.output[-2000:])
            assert cursor_is_shown(done.output), what
            if done.code == 0 and after_s:
                continue  # it was over before
            assert done.code == 130 and "Traceback" not in done.output, what
            assert done.seconds < 30, what
            ended += 1
            left = place.left()
            if name == "batch" and "out.jsonl" in left:  # grows by whole lines, and is gone on with
                left.remove("out.jsonl")
                text = (place.work / "out.jsonl").read_text()
                assert text == "" or (text.endswith("\n") and [json.loads(line) for line in text.splitlines()]), what
            assert left == ["in.jsonl"], what
    assert ended >= len(whole.stages)


# --- files of bounded size ----------------------------------------------------------------------------------------


def writers(checkpoint: Path, engine: Path) -> dict[str, tuple[object, ...]]:
    """Each command that writes, on something small."""
    return {
        "new-checkpoint": ("new-checkpoint", "out"),
        "batch": ("run", engine, "--batch", "in.jsonl", "--output", "out.jsonl"),
        "dump": ("dump", engine, "out", "--contexts", "100"),
        "plan": ("plan", checkpoint, "--chart", "out.svg"),
        "bench": ("bench", engine, "--contexts", "8", "--concurrency", "1", "--max-tokens", "4", "--chart", "out.png"),
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", writers(Path(), Path()))
def test_a_file_that_cannot_grow_is_one_line(
    name: str, runs: TerminalRuns, place: Place, tiny_checkpoint: Path, tiny_engines: dict[str, Path]
) -> None:
    """As on a full disk, or under a quota: the limit of the system (`ulimit -f`)."""
    inputs(place)
    args = writers(tiny_checkpoint, tiny_engines["exact"])[name]
    done = place.run(runs, *args, file_bytes=200)
    plain = _ESCAPE.sub("", done.output).replace("\r", "\n")
    errors = [line for line in plain.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(errors) == 1 and "Traceback" not in plain, plain[-3000:]
    assert cursor_is_shown(done.output)
    left = [one for one in place.left() if one != "in.jsonl"]
    assert left == (["out.jsonl"] if name == "batch" else []), plain[-2000:]


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
