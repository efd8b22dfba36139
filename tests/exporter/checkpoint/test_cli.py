"""`seekforge new-checkpoint`: what it prints, and that faults come out as our errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seekforge.common.errors import ConfigError, OutputError
from seekforge.exporter.checkpoint.cli import new_checkpoint
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.schema import expected_tensors, totals
from seekforge.formats.checkpoint.safetensors import Checkpoint


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(new_checkpoint, [str(arg) for arg in args])


def test_says_what_was_written_and_what_to_do_next(tmp_path: Path) -> None:
    result = run(tmp_path / "out")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert "8 files, 536 tensors, 38,389,952 parameters, 41.1 MB" in first
    assert second.startswith(f"next: seekforge export {tmp_path / 'out'}")
    again = run(tmp_path / "out", "--preset", "nano", "--force", "--quiet")
    assert (again.exit_code, again.output) == (0, "")


def test_json_is_one_object(tmp_path: Path) -> None:
    summary = json.loads(run(tmp_path / "out", "--preset", "nano", "--json").stdout)
    assert summary["path"] == str(tmp_path / "out")
    size = totals(expected_tensors(load_preset("nano").config))
    assert (summary["num_parameters"], summary["num_tensors"]) == (size.num_parameters, size.num_tensors)


def test_sparse_writes_structure_only(tmp_path: Path) -> None:
    result = run(tmp_path / "out", "--sparse")
    assert "holes that read as zero" in result.stdout
    assert not Checkpoint.open(tmp_path / "out").tensor("model.norm.weight").any()


@pytest.mark.parametrize(
    ("name", "args", "error"),
    [
        ("out", ["--preset", "full"], ConfigError),
        ("out", ["--preset", "huge"], ConfigError),
        ("file", ["--sparse"], OutputError),
        ("file", [], OutputError),
    ],
)
def test_faults_are_left_to_the_root_command(
    tmp_path: Path, name: str, args: list[str], error: type[Exception]
) -> None:
    (tmp_path / "file").write_text("x")
    result = run(tmp_path / name, *args)
    assert isinstance(result.exception, error)
    assert "\n" not in str(result.exception)
