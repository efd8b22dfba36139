"""Every command looks at the places it shall write to before it does anything else."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from seekforge.common import outputs
from seekforge.common.errors import OutputError
from seekforge.common.outputs import OUTPUTS, check_output_file, check_output_folder, check_output_store
from seekforge.runtime.cli import main as cli

#: Paths that commands read. A new one belongs here or among `OUTPUTS`.
READ = {
    "engine",
    "program",
    "checkpoint",
    "batch",
    "prompts",
    "plan_file",
    "from_dump",
    "inputs",
    "data",
    "include_path",
    "quality",
    "api_key_file",
    "admin_key_file",
}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("new-checkpoint", "{file}/out"), "is a file"),
        (("export", "/nowhere", "{file}"), "is a file, expected a folder"),
        (("export", "/nowhere", "{file}/out"), "is a file"),
        (("build", "/nowhere", "{file}/out", "--target", "cpu"), "is a file"),
        (("build", "/nowhere", "{new}", "--target", "h200", "--timing-cache", "{missing}/t"), "does not exist"),
        (("kernels", "build", "{file}/out"), "is a file"),
        (("kernels", "build", "{new}", "--cache", "{file}/cache"), "is a file"),
        (("plan", "/nowhere", "--chart", "{missing}/x.svg"), "does not exist"),
        (("plan", "/nowhere", "--chart", "{folder}"), "is a folder, expected the name of a file"),
        (("run", "/nowhere", "--batch", "x", "--output", "{missing}/x"), "does not exist"),
        (("bench", "/nowhere", "--chart", "{missing}/x.png"), "does not exist"),
        (("eval", "/nowhere", "--tasks", "x", "--output", "{file}"), "is a file"),
        (("eval", "/nowhere", "--tasks", "x", "--output", "{file}/out"), "is a file"),
        (("parity", "/nowhere", "--html", "{missing}/x.html"), "does not exist"),
        (("parity", "/nowhere", "--html", "{folder}"), "is a folder"),
        (("parity", "/nowhere", "--save", "{file}/out"), "is a file"),
        (("dump", "/nowhere", "{file}/out"), "is a file"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_first(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    """Before the input, which is not there either."""
    (tmp_path / "file").write_text("mine")
    places = {"file": tmp_path / "file", "missing": tmp_path / "missing", "folder": tmp_path, "new": tmp_path / "new"}
    result = CliRunner().invoke(cli.main, [arg.format(**places) for arg in args])
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr and str(tmp_path) in result.stderr and "/nowhere" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["export", "build", "plan", "parity", "dump"])
def test_a_place_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By the function of `seekforge` that a command calls, or by the command line where there is none."""
    out = str(tmp_path / "new")
    args = {
        "export": ("/nowhere", out),
        "build": ("/nowhere", out, "--target", "cpu", "--checkpoint", "/nowhere"),
        "plan": ("/nowhere", "--chart", f"{out}.svg"),
        "parity": ("/nowhere", "--html", out),
        "dump": ("/nowhere", out),
    }
    seen: list[Path] = []
    for kind, check in list(outputs._CHECKS.items()):
        monkeypatch.setitem(outputs._CHECKS, kind, lambda path, check=check: (seen.append(path), check(path)))
    result = CliRunner().invoke(cli.main, [name, *args[name]])
    assert result.exit_code == 2 and "/nowhere" in result.stderr
    assert [path.stem for path in seen] == ["new"]


def test_a_word_of_an_option_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output may be called as a choice is, also when it is there already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fp8").mkdir()
    for args in (("export", "/nowhere", "fp8", "--numerics", "fp8"), ("build", "/nowhere", "fp8", "--target", "cpu")):
        result = CliRunner().invoke(cli.main, [*args, "--force"])
        assert result.exit_code == 2 and "read by the same command" not in result.stderr, result.stderr


def test_every_path_of_every_command_is_read_or_checked() -> None:
    seen: set[str] = set()

    def walk(command: click.Command) -> None:
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                seen.add(parameter.name or "")
                assert (parameter.name in OUTPUTS) != (parameter.name in READ), f"{command.name}: {parameter.name}"
            else:
                assert parameter.name not in OUTPUTS, f"{command.name}: {parameter.name} is no path"
        for below in command.commands.values() if isinstance(command, click.Group) else ():
            walk(below)

    for entry in cli.COMMANDS.values():
        module, _, attribute = entry.target.partition(":")
        walk(getattr(importlib.import_module(module), attribute))
    assert seen == {*OUTPUTS, *READ}


def test_a_folder_is_made_with_those_above_it_and_a_file_is_not(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "a" / "b" / "c")
    check_output_folder(tmp_path)
    check_output_file(tmp_path / "new")
    check_output_file(Path("new"))  # here
    with pytest.raises(OutputError, match=r"since .*/a does not exist; make that folder first"):
        check_output_file(tmp_path / "a" / "new")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is no folder"):
        check_output_file(tmp_path / "file" / "new")


def test_a_place_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for check in (check_output_file, check_output_folder):
        with pytest.raises(OutputError, match="no permission to write"):
            check(tmp_path / "new")
    (tmp_path / "file").touch()
    check_output_file(tmp_path / "file")  # it may be written, though none may be added
    (tmp_path / "store").mkdir()
    check_output_store(tmp_path / "store")  # filled where it is
    with pytest.raises(OutputError, match="no permission to write"):
        check_output_folder(tmp_path / "store")  # would be replaced by another
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "store")
    with pytest.raises(OutputError, match="no permission to write"):
        check_output_store(tmp_path / "store")


def test_a_folder_that_cannot_be_searched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    result = CliRunner().invoke(cli.main, ["export", "/nowhere", str(tmp_path / "a")])
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {tmp_path / 'a'}: cannot be written (Permission")


@pytest.mark.parametrize(
    "args",
    [
        ("run", "/nowhere", "--batch", "{file}", "--output", "{file}"),
        ("run", "/nowhere", "--batch", "{file}", "--output", "{link}"),
        ("run", "/nowhere", "--batch", "{hard}", "--output", "{file}"),
        ("run", "/nowhere", "--batch", "{file}", "--output", "{folder}/sub/../file"),
        ("plan", "{file}", "--chart", "{file}"),
        ("parity", "/nowhere", "--prompts", "{file}", "--html", "{hard}"),
        ("parity", "/nowhere", "--html", "{new}", "--save", "{new}"),
        ("dump", "/nowhere", "{folder}", "--plan", "{file}", "--force"),
        ("export", "{folder}/sub", "{folder}", "--force"),
        ("build", "{folder}/sub", "{folder}/sub", "--target", "cpu", "--force"),
        ("build", "{file}", "{new}", "--target", "h200", "--timing-cache", "{link}"),
    ],
)
def test_no_command_writes_over_what_it_reads(tmp_path: Path, args: tuple[str, ...]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    names = {name: tmp_path / name for name in ("file", "link", "hard", "new")} | {"folder": tmp_path}
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(cli.main, [arg.format(**names) for arg in args])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "read by the same command" in result.stderr or "written twice" in result.stderr
    assert (tmp_path / "file").read_text() == "mine" and sorted(tmp_path.rglob("*")) == before
