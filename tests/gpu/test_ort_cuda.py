"""The step of `make gpu-check` that runs engines through CUDA: commands that users type, and they pass on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from tests.gpu.ort_cuda import PRESETS, commands

from seekforge.runtime.cli import main as cli


@pytest.mark.parametrize("preset", PRESETS)
def test_every_command_is_one_that_its_parser_takes(preset: str) -> None:
    names = []
    for name, *rest in commands(Path("folder"), preset, "ort-cuda"):
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None
        command.make_context(name, rest, parent=click.Context(cli.main, info_name="seekforge"))
        names.append(name)
    assert names.index("build") < names.index("run") < names.index("parity")


@pytest.mark.slow  # a whole export, build and parity check in processes of their own
def test_the_same_commands_pass_on_a_cpu(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.gpu.ort_cuda", str(tmp_path), "--target", "cpu", "--preset", "tiny"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity" in done.stdout
