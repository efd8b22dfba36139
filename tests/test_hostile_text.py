"""Text from files and from the command line, hostile, through every command that prints: it is shown and never acts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from seekforge.common.cli.charts import Line, Panel, write_charts
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.runtime.cli import main as cli

#: Markup of rich, HTML, a color, a window's title, a C1 sequence, an override of direction, a line break.
HOSTILE = "a[/x]b[bold]<script>alert(1)</script>$\\frac$\x1b[31m\x1b]0;t\x07\x9b1m\u202eb\u2028\x85c"
NAMES = {
    "markup": "a[/]b[bold]c[/x]",
    "escape": "a\x1b[31mred\x1b]0;title\x07",
    "c1": "a\x9b31m\x85b",
    "direction": "a\u202egnp.exe\u2066",
    "bytes": os.fsdecode(b"a\xff\x9b"),
    "line": "a\nerror: b",
}
ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


def run(*args: str | Path) -> Any:
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    for text in (result.stdout, result.stderr):
        assert not ACTIVE.search(text), repr(ACTIVE.search(text))
    if result.exit_code == 2:
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    return result


def missing(name: str) -> dict[str, tuple[str, ...]]:
    """Each command on a path that is not there."""
    return {
        "new-checkpoint": ("new-checkpoint", f"{name}/x", "--preset", name),
        "export": ("export", name, "out"),
        "build": ("build", name, "out", "--target", "cpu", "--checkpoint", name),
        "build target": ("build", name, "out", "--target", name),
        "kernels": ("kernels", "build", "out", "--model", name),
        "run": ("run", name, "--prompt", name),
        "run batch": ("run", name, "--batch", name, "--output", f"{name}.out"),
        "bench": ("bench", name),
        "eval": ("eval", name, "--tasks", name),
        "parity": ("parity", name, "--checkpoint", name),
        "dump": ("dump", name, "out"),
        "inspect": ("inspect", name),
        "targets": ("targets", "--target", name),
        "plan": ("plan", name),
        "plan target": ("plan", "full", "--target", name),
        "option": ("plan", "full", f"--{name}"),
        "value": ("plan", "full", "--contexts", name),
        "command": (name,),
        "completion": ("completion", name),
    }


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("command", missing("x"))
def test_a_hostile_argument_is_shown_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*missing(name)[command])
    assert result.exit_code == 2


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_hostile_folders_are_inspected_planned_and_exported(
    tiny_checkpoint: Path, tiny_engines: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    checkpoint, engine = folder / "ck", folder / "eng"
    shutil.copytree(tiny_checkpoint, checkpoint, copy_function=os.link)
    shutil.copytree(tiny_engines["fp8"], engine, copy_function=os.link)
    for path in (checkpoint, engine):
        assert run("inspect", path).exit_code == 0
        assert run("inspect", path, "--json").exit_code == 0
    assert run("plan", checkpoint / "config.json").exit_code == 0
    done = run("run", engine, "--prompt", "a", "--max-tokens", "2", "--json")
    if name.isprintable() or name.encode(errors="replace").decode() == name:
        assert done.exit_code == 0 and json.loads(done.stdout)["token_ids"]
    else:  # the libraries that open files there take no name that is not UTF-8
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert run("new-checkpoint", folder / "new", "--preset", "nano").exit_code == 0


def test_hostile_tensor_names_are_shown(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "ck"
    shutil.copytree(tiny_checkpoint, checkpoint, copy_function=os.link)
    index = checkpoint / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    index.unlink()
    write_shard(checkpoint / "hostile.safetensors", {HOSTILE: np.zeros(4, np.float32)})
    listed["weight_map"][HOSTILE] = "hostile.safetensors"
    index.write_text(json.dumps(listed))
    for args in (("inspect", checkpoint), ("inspect", checkpoint, "--json"), ("export", checkpoint, tmp_path / "out")):
        run(*args)


def poison(value: Any, key: str = "") -> Any:
    """Every text in a JSON value that is no digest and no key of a table."""
    if isinstance(value, dict):
        return {name: poison(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [poison(one, key) for one in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("file", ["program.json", "bindings.json", "config.json", "tokenizer.json"])
def test_artifacts_full_of_hostile_text_are_one_line(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, file: str
) -> None:
    program = tmp_path / "prog"
    shutil.copytree(tiny_programs["fp8"], program)
    if not (program / file).exists():
        pytest.skip(f"a program has no {file}")
    raw = json.loads((program / file).read_text())
    for key in raw if isinstance(raw, dict) else ():
        (program / file).write_text(json.dumps(raw | {key: poison(raw[key])}))
        run("inspect", program)
        run("build", program, tmp_path / "out", "--target", "cpu", "--checkpoint", tiny_checkpoint, "--dry-run")


def test_hostile_configs_of_targets_are_one_line(tmp_path: Path) -> None:
    target = tmp_path / "t.yaml"
    target.write_text(json.dumps({"title": HOSTILE, HOSTILE: HOSTILE}))
    for args in (("targets", "--target", target), ("plan", "full", "--target", target)):
        assert run(*args).exit_code == 2


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_charts_take_any_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"chart{suffix}"
    write_charts(path, [Panel(HOSTILE, HOSTILE, HOSTILE, (Line(HOSTILE, ((1, 1), (2, 3))),), ((HOSTILE, 2.0),))])
    if suffix == ".svg":
        root = ElementTree.parse(path).getroot()  # well formed
        assert not [one for one in root.iter() if one.tag.endswith("script")]
        texts = ["".join(one.itertext()) for one in root.iter() if one.tag.endswith("text")]
        assert sum("<script>alert(1)</script>$\\frac$\\x1b[31m" in text for text in texts) >= 4


def test_what_a_model_writes_does_not_act_on_a_terminal(toy_hostile: Callable[[bool], bytes]) -> None:
    assert b"\x1b]0;" in toy_hostile(False)
    assert b"\x1b]0;" not in toy_hostile(True) and b"\\x1b]0;" in toy_hostile(True)


@pytest.fixture
def toy_hostile() -> Callable[[bool], bytes]:
    """What `run` writes of a hostile delta, to a terminal or into a pipe."""
    script = "from seekforge.runtime.cli.run import write_generated\nwrite_generated('text \\x1b]0;title\\x07\\n')"

    def write(tty: bool) -> bytes:
        if not tty:
            return subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        ours, theirs = os.openpty()
        subprocess.run([sys.executable, "-c", script], stdout=theirs, check=True)
        os.close(theirs)
        return os.read(ours, 65536)

    return write
