"""Every command of README, docs and examples that can run here is run as a stranger would, in a fresh folder.

Blocks of a page run in their order, in the page's folder, with what the page takes for granted laid there before. Exit
codes are compared, and what the page shows: where it says times and measured values, all but the numbers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.lm_eval_tasks import write_tasks
from tests.support.terminal_runs import Run, TerminalRuns

ROOT = Path(__file__).resolve().parents[1]
#: Beginning of a command -> why it is not run here.
NOT_HERE = {
    "make ": "sets up an environment of its own; its commands stand below it, or in the Makefile",
    "podman ": "needs a builder of images",
    "ENGINE=$PWD/demo/engine docker": "needs a builder of images",
    "curl ": "asks a server that is told to run in another terminal",
    "pip install": "installs from the network",
    ". .venv/bin/activate": "belongs to an environment that make sets up",
    "python -m dynamo.frontend": "needs ai-dynamo; tests/runtime/dynamo/test_frontend.py starts it",
    "seekforge dynamo": "as the line before",
    "seekforge ray": "needs ray; tests/runtime/ray/test_serve.py starts it",
    "python -m pytest": "is what runs these tests, with GPUs",
    "python examples/tool_call.py": "asks a server; tests/test_examples.py does",
    "python examples/grpo.py": "trains for an hour; tests/test_examples.py makes one step",
    "lm_eval ": "is another program, with tasks from the network",
    "think=": "sets a variable of the shell for what downloads",
    "seekforge eval engine --tasks mmlu": "downloads its questions",
    "seekforge eval engine --tasks gpqa": "downloads its questions",
    "seekforge eval engine --tasks aime": "downloads its questions",
    "seekforge eval engine --tasks minerva": "downloads its questions",
    "seekforge eval engine --tasks ifeval": "downloads its questions",
    "seekforge eval engine --tasks humaneval": "downloads its questions",
    "seekforge eval engine --tasks niah": "downloads its questions",
    "python -m tests.benchmarks.": "measures for long, beside programs and engines that have to be made before",
    "seekforge train my-nano": "trains for an hour; tests/exporter/training has a slow test of it",
    "seekforge train tuned": "takes 200 steps; tests/test_terminals.py and tests/test_quiet.py train so with fewer",
    "seekforge kernels build": "compiles hundreds of kernels; tests/exporter/builder/test_kernels_cli.py builds some",
    "seekforge kernels estimate --sm 90 #": "compiles kernels, as tests/exporter/builder/test_estimate_cli.py does",
    "seekforge kernels estimate --sm 90 --shape batch": "as the line before",
    "seekforge kernels estimate --target h200": "as the line before",
    "seekforge export full full-program": "the 671B model: tests/exporter/program has a slow test of it",
    "seekforge export CHECKPOINT PROGRAM": "the 671B model, as the line before",
    "seekforge export CHECKPOINT PART": "the 671B model, as the line before",
    "seekforge export CHECKPOINT SMALL": "the 671B model, as the line before",
    "seekforge export CHECKPOINT RANKS": "the 671B model; tests/exporter/program/test_ranks.py exports ranks of tiny",
    "seekforge inspect RANKS": "of what the line before makes",
    "seekforge export CHECKPOINT program --tp 8": "the 671B model, as the lines before",
    "seekforge build program engine --target h200 --checkpoint CHECKPOINT": "is built where such GPUs are",
    "seekforge run engine --prompt Hello # eight": "runs on eight GPUs",
}
#: A line that says times, versions or what was measured, and in which only the numbers may differ.
_MEASURED = re.compile(
    r"\d s\)|tok/s|e-\d\d|\d{5}\.|difference| MB|^plans|^kernels:|127\.0\.0\.1|^[a-z_]+ +\d+\.|within|score|bytes,"
)
_NUMBER = re.compile(r"[+-]?\d[\d,.]*(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Line:
    """A command of a page, and what the page shows of its output."""

    page: str
    number: int
    command: str
    shown: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command, comments=True)

    def __str__(self) -> str:
        return f"{self.page}:{self.number}: {self.command}"


def lines_of(page: Path) -> Iterator[Line]:
    """Yield the commands of a page's blocks: what stands behind a `$`, and in blocks without any what is ours."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if block[1] not in ("", "console"):
            continue
        rows = block[2].replace("\\\n", " ").splitlines()
        at = text[: block.start(2)].count("\n") + 1
        begins = [i for i, row in enumerate(rows) if row.startswith("$ ")]
        begins = begins or [i for i, row in enumerate(rows) if re.match(r"(seekforge|make) ", row)]
        for begin, end in zip(begins, [*begins[1:], len(rows)]):
            shown = [row.rstrip() for row in rows[begin + 1 : end]]
            said = tuple(row for row in shown if row and not re.match(r"\d\. |Done\. ", row) and set(row) != {"─"})
            yield Line(page.relative_to(ROOT).as_posix(), at + begin, rows[begin].removeprefix("$ "), said)


PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
    if any(lines_of(page))
]
LINES = [line for page in PAGES for line in lines_of(page)]


def begins(line: Line, begin: str) -> bool:
    return " ".join(line.command.split()).startswith(begin)


def why_not(line: Line) -> str | None:
    """Return why a command is not run here; None: it is."""
    found = next((why for begin, why in NOT_HERE.items() if begins(line, begin)), None)
    if found is None and not line.command.startswith("seekforge eval"):
        return None
    missing = "lm_eval is not installed" if importlib.util.find_spec("lm_eval") is None else None
    return found or missing


def test_every_reason_is_one_of_a_command_and_most_are_run() -> None:
    for begin in NOT_HERE:
        assert any(begins(line, begin) for line in LINES), begin
    run = [line for line in LINES if why_not(line) is None]
    assert len(run) > 40, list(map(str, run))


@pytest.fixture(scope="module")
def runs() -> Iterator[TerminalRuns]:
    modules = ("torch", "onnx", "onnxruntime", "tokenizers", "seekforge.exporter.program.export")
    with closing(TerminalRuns((*modules, "seekforge.exporter.parity.api"))) as made:
        yield made


def run_line(runs: TerminalRuns, line: Line, folder: Path) -> tuple[int, str]:
    """Run a command; returns its exit code and all that it printed."""
    words, home = line.words, folder.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if words[0] == "seekforge":
        how = {"interrupt_when": "serving ", "interrupt_by": "SIGTERM"} if words[1] == "serve" else {}
        done = runs.run(Run(words[1:], str(folder), environment, pipes=True, **how))  # type: ignore
        return done.code, done.output
    assert words[0] in ("python", ".venv/bin/python"), line
    command = [sys.executable, str(ROOT / words[1]), *words[2:]]
    made = os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=folder, env=made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def faults(line: Line, code: int, output: str) -> Iterator[str]:
    """Yield what of a page is not true of what came."""
    expected = 2 if any(row.startswith("error: ") for row in line.shown) else 0
    if code != expected:
        yield f"{line}: exit code {code}, expected {expected}: {output[-1500:]}"
        return
    came = [" ".join(row.split()) for row in output.splitlines()]
    masked = [_NUMBER.sub("#", row) for row in came]
    for row in line.shown:
        said = " ".join(row.split())
        head = said.partition("…")[0]
        if not head:
            continue
        if _MEASURED.search(row):
            fits = any(one.startswith(_NUMBER.sub("#", head)) for one in masked)
        else:
            fits = any(one.startswith(head) if "…" in said else one == said for one in came)
        if not fits:
            yield f"{line}: shows {said!r}, came:\n{output[-3000:]}"


def run_page(runs: TerminalRuns, name: str, folder: Path) -> list[str]:
    """Run the commands of a page in a folder; returns what is not true."""
    found: list[str] = []
    for line in LINES:
        if line.page == name and why_not(line) is None:
            prepare_line(line, folder)
            found += faults(line, *run_line(runs, line, folder))
    return found


def prepare_line(line: Line, folder: Path) -> None:
    """Remove what an earlier block of the page made under the name that this one makes; lay what this one takes."""
    if line.command.startswith("seekforge export CHECKPOINT program"):
        for made in ("program", "engine"):
            shutil.rmtree(folder / made, ignore_errors=True)


@pytest.fixture(scope="module")
def demo(runs: TerminalRuns, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which docs/demo.md was followed, and what was not true of it."""
    folder = tmp_path_factory.mktemp("demo") / "here"
    folder.mkdir()
    found: list[str] = []
    for line in LINES:
        if line.page != "docs/demo.md" or why_not(line) is not None:
            continue
        if " damaged " in line.command:
            shutil.copytree(folder / "demo" / "engine", folder / "damaged")
            os.truncate(folder / "damaged" / "weights.bin", 1000)
        found += faults(line, *run_line(runs, line, folder))
    return folder / "demo", found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_is_as_it_is_shown(demo: tuple[Path, list[str]]) -> None:
    assert not demo[1], "\n\n".join(demo[1])


def lay(folder: Path, **places: Path) -> None:
    for name, place in places.items():
        (folder / name).symlink_to(place)


def tasks(folder: Path, demo: Path) -> None:
    """Questions that nano answers wrong, and a text that it finds likely: its own."""
    from seekforge.runtime import LLM, SamplingParams

    rows = [{"task": "arithmetic", "prompt": "1 + 1 = ", "answer": "x", "match": "exact", "max_tokens": 2}] * 3
    begin = "Once upon a time"
    with LLM(demo / "engine", threads=1) as llm:
        text = begin + llm.generate(begin, SamplingParams(max_tokens=80, temperature=0))[0].outputs[0].text
    written = [*rows, {"task": "english", "text": text}]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")


def of_quality(folder: Path, demo: Path) -> None:
    engines = {"ENGINE": demo / "engine", "ENGINE2": demo / "engine-exact"}
    lay(folder, CHECKPOINT=demo / "checkpoint", checkpoint=demo / "checkpoint", program=demo / "program", **engines)
    tasks(folder, demo)


def of_evaluation(folder: Path, demo: Path) -> None:
    lay(folder, engine=demo / "engine")
    write_tasks(folder / "tasks", 3)
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    page = re.search(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    question = re.search(r"`(\{\"question\".*?\})`", text)
    assert page is not None and question is not None
    (folder / "tasks" / "sums.yaml").write_text(page[1], encoding="utf-8")
    (folder / "tasks" / "sums.jsonl").write_text(question[1] + "\n", encoding="utf-8")


def of_ranks(folder: Path, demo: Path) -> None:
    """A model whose experts can be shared among ranks: nano's have a block each."""
    from seekforge.exporter.checkpoint.new import new_checkpoint

    new_checkpoint(folder / "CHECKPOINT", "tiny")


def of_training(folder: Path, demo: Path) -> None:
    (folder / "rows.jsonl").write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n' * 4, encoding="utf-8")


#: Page -> what it takes for granted, laid into its folder.
TAKEN: dict[str, Callable[[Path, Path], None]] = {
    "README.md": lambda folder, demo: lay(folder, CHECKPOINT=demo / "checkpoint", demo=demo),
    "docs/cpu.md": lambda folder, demo: lay(folder, checkpoint=demo / "checkpoint", program=demo / "program"),
    "docs/multi-gpu.md": of_ranks,
    "docs/rl.md": lambda folder, demo: lay(folder, CHECKPOINT=demo / "checkpoint"),
    "docs/server.md": lambda folder, demo: lay(folder, demo=demo),
    "docs/parity.md": lambda folder, demo: lay(folder, CHECKPOINT=demo / "checkpoint", ENGINE=demo / "engine-exact"),
    "docs/quality.md": of_quality,
    "docs/evaluation.md": of_evaluation,
    "docs/nano.md": of_training,
    "examples/README.md": lambda folder, demo: lay(folder, demo=demo),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [page.relative_to(ROOT).as_posix() for page in PAGES if page.name != "demo.md"])
def test_the_commands_of_a_page_do_what_it_says(
    name: str, runs: TerminalRuns, demo: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "home").symlink_to(demo[0].parents[1] / "home")  # whoever follows the pages verified engines before
    if name in TAKEN:
        TAKEN[name](folder, demo[0])
    found = run_page(runs, name, folder)
    assert not found, "\n\n".join(found)
