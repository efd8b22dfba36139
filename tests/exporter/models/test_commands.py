"""The commands of docs/index.md for every family, as they stand there and for checkpoints in BF16; two exports each."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime.cli import main as cli

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[3] / "docs" / "index.md"
FULL = {"tiny": "full", "tiny-v3": "v3-full", "glm5-tiny": "glm5-full"}


def commands() -> list[str]:
    """Return the commands of the page, without `seekforge`."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [one for one in blocks if "--preset glm5-tiny" in one]
    return [line.removeprefix("$ seekforge ") for line in block.strip().splitlines()]


def of(command: str, preset: str, dtype: str) -> str:
    """Return a command for another preset: what the page says of BF16 and of caches is put in."""
    command = command.replace("--preset glm5-tiny", f"--preset {preset}").replace("glm5-full", FULL[preset])
    if command.startswith("new-checkpoint") and dtype != "fp8":
        command += f" --dtype {dtype}"
    if "--target rtx4090" in command and preset == "tiny-v3":
        command += " --kv-cache-dtype bf16"
    return command


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
@pytest.mark.parametrize("preset", FULL)
def test_the_commands_of_the_page_pass(
    preset: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    monkeypatch.chdir(tmp_path)
    said: dict[str, str] = {}
    for line in commands():
        command = of(line, preset, dtype)
        result = CliRunner().invoke(cli.main, shlex.split(command))
        assert result.exit_code == 0, f"{command}: {result.output}"
        said[line] = result.output
    build, parity, plan = (next(text for line, text in said.items() if word in line) for word in CHECKED)
    assert "self-check" in build and parity.rstrip().endswith("passed") and "rtx4090" in plan
    assert load_manifest(tmp_path / "engine-rtx4090").audit is not None
    assert any("--max-tokens" in line and "decode" in text for line, text in said.items())


CHECKED = ("engine --target cpu", "parity", "plan")
