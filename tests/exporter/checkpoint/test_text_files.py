"""Odd files in a downloaded folder are refused at once, by name, and nothing is copied that is not of the folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.common.errors import CheckpointError
from seekforge.exporter.checkpoint.text_files import check_files, read_text_file, text_files
from seekforge.formats.checkpoint.tools_preamble import ENCODING_FILE, TOOLS_PREAMBLE
from seekforge.runtime.cli.main import main


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint", copy_function=os.link))


def replace(path: Path, make: Callable[[Path], None]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


ODD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "config fifo": ("config.json", os.mkfifo, "config.json: cannot be read (is a FIFO"),
    "config device": ("config.json", lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "config large": ("config.json", large, "expected at most"),
    "index fifo": ("model.safetensors.index.json", os.mkfifo, "is a FIFO"),
    "index loop": ("model.safetensors.index.json", lambda path: path.symlink_to(path.name), "symbolic links"),
    "index nowhere": ("model.safetensors.index.json", lambda path: path.symlink_to("/nowhere/x"), "No such file"),
    "defaults nowhere": ("generation_config.json", lambda path: path.symlink_to("/nowhere/x"), "No such file"),
    "index folder": ("model.safetensors.index.json", os.mkdir, "is a folder"),
    "shard device": ("model-00001-of-000003.safetensors", lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "shard fifo": ("model-00001-of-000003.safetensors", os.mkfifo, "is a FIFO"),
    "tokenizer fifo": ("tokenizer.json", os.mkfifo, "is a FIFO"),
    "tokenizer elsewhere": ("tokenizer.json", lambda path: path.symlink_to("/etc/passwd"), "leads outside"),
    "template large": ("chat_template.jinja", large, "expected at most 16,777,216"),
    "defaults device": ("generation_config.json", lambda path: path.symlink_to("/dev/zero"), "is a device"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_is_one_line_and_nothing_is_written(case: str, folder: Path, tmp_path: Path) -> None:
    name, make, words = ODD[case]
    replace(folder / name, make)
    out = tmp_path / "program"
    done = CliRunner().invoke(main, ["export", str(folder), str(out)])
    assert done.exit_code == 2 and not out.exists()
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["export", "inspect", "build"])
def test_an_odd_file_is_said_before_torch_is_imported(command: str, folder: Path, tmp_path: Path) -> None:
    replace(folder / "config.json", os.mkfifo)
    (tmp_path / "program").mkdir()
    os.mkfifo(tmp_path / "program" / "program.json")
    arguments = {
        "export": [str(folder), str(tmp_path / "out")],
        "inspect": [str(folder)],
        "build": [str(tmp_path / "program"), str(tmp_path / "out"), "--target", "cpu", "--checkpoint", str(folder)],
    }[command]
    code = (
        "import sys\nfrom seekforge.runtime.cli.main import main\n"
        f"try:\n    main({[command, *arguments]!r})\n"
        "except SystemExit as end:\n    assert end.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "is a FIFO" in done.stderr, done.stderr


def test_a_snapshot_of_the_hub_is_read_through_its_links(tiny_checkpoint: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in tiny_checkpoint.rglob("*") if p.is_file())):
        blob = blobs / f"{number:040x}"
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(tiny_checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    check_files(snapshot)
    assert text_files(snapshot) == text_files(tiny_checkpoint)
    export = ["export", str(snapshot), str(tmp_path / "program"), "--num-layers", "1", "--quiet"]
    done = CliRunner().invoke(main, export)
    assert done.exit_code == 0, done.output
    copied = tmp_path / "program" / "tokenizer.json"
    assert not copied.is_symlink() and copied.read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_what_is_no_text_file_stays_behind(folder: Path) -> None:
    before = text_files(folder)
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv32.py").touch()
    assert text_files(folder) == before


def test_a_difference_of_the_text_about_tools_is_a_warning(folder: Path, tmp_path: Path) -> None:
    """The file is read and not executed."""
    (folder / "encoding").mkdir()
    changed = TOOLS_PREAMBLE.replace("strongly", "never")
    mark = tmp_path / "mark"
    (folder / ENCODING_FILE).write_text(f"TOOLS = {changed!r}\nopen({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    export = ["export", str(folder), str(tmp_path / "program"), "--num-layers", "1", "--quiet"]
    done = CliRunner().invoke(main, export)
    assert done.exit_code == 0 and done.stderr.count("differs from DeepSeek-V3.2's") == 1
    assert not mark.exists() and not (tmp_path / "program" / "encoding").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), large, os.mkdir])
def test_what_is_copied_is_looked_at_when_it_is_read(folder: Path, make: Callable[[Path], None]) -> None:
    """A file may have been replaced since it was found good."""
    names = text_files(folder)
    for name in names:
        replace(folder / name, make)
        with pytest.raises(CheckpointError, match=name):
            read_text_file(folder, name)


def test_a_template_that_no_engine_could_read_is_said_at_export(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is no text \('utf-8'.*download it again"):
        read_text_file(folder, "chat_template.jinja")
