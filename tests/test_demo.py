"""The demo runs: one thread for each command, output in the order that is told, no process left when one fails."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from tests import demo

#: Stands in for seekforge: says something, waits for a file or for nothing, ends with a code.
COMMAND = """
import os, pathlib, sys, time
word, file, code = sys.argv[1:]
print(word, os.environ["OMP_NUM_THREADS"], flush=True)
pathlib.Path(word + ".pid").write_text(str(os.getpid()))
while file != "-" and not pathlib.Path(file).exists():
    time.sleep(0.01)
sys.exit(int(code))
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SEEKFORGE", [sys.executable, "-c", COMMAND])
    monkeypatch.setenv("OMP_NUM_THREADS", "8")


def test_what_ran_behind_is_shown_where_its_turn_comes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with demo.Demo() as runner:
        behind = runner.begin("behind", "go", "0")
        runner.show("front", "-", "0")
        (tmp_path / "go").touch()
        runner.finish(behind)
    lines = ["$ seekforge front - 0", "front 1", "$ seekforge behind go 0", "behind 1"]
    assert capfd.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("code", (1, 2))
def test_a_command_that_fails_ends_the_demo_and_what_runs_behind(tmp_path: Path, code: int) -> None:
    with pytest.raises(SystemExit) as ended, demo.Demo() as runner:
        runner.begin("behind", "never", "0")
        while not (tmp_path / "behind.pid").exists() or not (tmp_path / "behind.pid").read_text():
            time.sleep(0.01)
        runner.show("front", "-", str(code))
    assert ended.value.code == code
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "behind.pid").read_text()), 0)


def test_a_failure_behind_is_the_demo_s_when_it_is_shown() -> None:
    with pytest.raises(SystemExit) as ended, demo.Demo() as runner:
        runner.finish(runner.begin("behind", "-", "2"))
    assert ended.value.code == 2
