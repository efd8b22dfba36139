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

from seekforge.common.errors import CheckpointError, SeekforgeError
from seekforge.exporter.checkpoint.text_files import check_files, text_files
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


def many(path: Path) -> None:
    for number in range(1001):
        (path / str(number)).touch()


def deep(path: Path) -> None:
    (path / "/".join("a" * 20)).mkdir(parents=True)


ODD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "config fifo": ("config.json", os.mkfifo, "config.json: cannot be read (is a FIFO"),
    "config device": ("config.json", lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "config large": ("config.json", large, "expected at most"),
    "index fifo": ("model.safetensors.index.json", os.mkfifo, "is a FIFO"),
    "index folder": ("model.safetensors.index.json", os.mkdir, "is a folder"),
    "shard device": ("model-00001-of-000003.safetensors", lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "shard fifo": ("model-00001-of-000003.safetensors", os.mkfifo, "is a FIFO"),
    "tokenizer fifo": ("tokenizer.json", os.mkfifo, "is a FIFO"),
    "tokenizer elsewhere": ("tokenizer.json", lambda path: path.symlink_to("/etc/passwd"), "leads outside"),
    "defaults device": ("generation_config.json", lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "encoding itself": ("encoding/loop", lambda path: path.symlink_to("."), "loop: is a link"),
    "encoding up": ("encoding/up", lambda path: path.symlink_to(".."), "up: is a link"),
    "encoding link": ("encoding", lambda path: path.symlink_to("/etc"), "encoding: is a link"),
    "encoding file": ("encoding/secret", lambda path: path.symlink_to("/etc/passwd"), "leads outside"),
    "encoding fifo": ("encoding/fifo", os.mkfifo, "is a FIFO"),
    "encoding no folder": ("encoding", os.mkfifo, "is no folder"),
    "encoding many": ("encoding", lambda path: (path.mkdir(), many(path))[0], "more than 1000 files"),
    "encoding deep": ("encoding", deep, "deeper than 8"),
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
    copied = tmp_path / "program" / "encoding" / "encoding_dsv32.py"
    assert not copied.is_symlink() and copied.read_bytes() == (snapshot / "encoding/encoding_dsv32.py").read_bytes()


def test_caches_of_python_stay_behind(folder: Path) -> None:
    (folder / "encoding" / "__pycache__").mkdir()
    (folder / "encoding" / "__pycache__" / "x.pyc").touch()
    (folder / "encoding" / "tests").mkdir()
    (folder / "encoding" / "tests" / "a.json").touch()
    assert text_files(folder)[3:] == ["encoding/encoding_dsv32.py", "encoding/tests/a.json"]
    with pytest.raises(SeekforgeError) as caught:
        os.mkfifo(folder / "encoding" / "tests" / "fifo")
        text_files(folder)
    assert isinstance(caught.value, CheckpointError)
