"""Commands that the code starts as processes, run in this one: for tests of what comes of them, not of the process."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from seekforge.exporter.parity.sides import engine as engine_side
from seekforge.runtime.cli import main as cli


def dump_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine's side write its dumps here: a process takes a second to start, and a check starts several."""
    monkeypatch.setattr(engine_side, "subprocess", SimpleNamespace(run=_run_dump))


def _run_dump(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    assert command[1:3] == ["-m", "seekforge.runtime.cli.dump"], command
    result = CliRunner().invoke(cli.main, ["dump", *command[3:]])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(command, result.exit_code, result.stdout, result.stderr)
