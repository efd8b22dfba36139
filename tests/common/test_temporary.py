"""What a killed process leaves behind is gone after the next command; what a live one works in stays."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from seekforge.common import temporary
from seekforge.common.files import atomic_folder, replace_file
from seekforge.common.temporary import sweep, temporary_folder


@pytest.fixture(autouse=True)
def swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[Path]:
    """Each test is a process of its own, with an empty TMPDIR."""
    found: set[Path] = set()
    monkeypatch.setattr(temporary, "_SWEPT", found)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return found


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code`, which prints a line and waits; it is killed in the end."""
    head = (
        "import sys, time\nfrom pathlib import Path\n"
        "from seekforge.common.files import atomic_folder\n"
        "from seekforge.common.temporary import temporary_folder, temporary_file\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


WAIT = "print('ready', flush=True); time.sleep(60)"


def test_the_temporary_folder_of_a_killed_process_is_removed(tmp_path: Path, swept: set[Path]) -> None:
    code = f"with temporary_folder('seekforge-parity') as f:\n (f / 'big').write_bytes(bytes(1000)); {WAIT}"
    with child(code) as process:
        (left,) = (tmp_path / "tmp").iterdir()
        sweep(tmp_path / "tmp")
        assert (left / "big").exists(), "its process lives"
        kill(process)
        swept.clear()
        with temporary_folder("seekforge-parity") as mine:
            assert list((tmp_path / "tmp").iterdir()) == [mine]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_killed_build_is_removed_by_the_next_command_into_any_folder_beside_it(
    tmp_path: Path, swept: set[Path]
) -> None:
    code = f"with atomic_folder(Path({str(tmp_path / 'engine')!r})) as f:\n (f / 'weights').touch(); {WAIT}"
    with child(code) as process:
        (left,) = tmp_path.glob(".engine.*")
        with atomic_folder(tmp_path / "other"):
            assert left.exists(), "its process lives"
        kill(process)
        swept.clear()
        with atomic_folder(tmp_path / "third"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "third", "tmp"]


def test_what_was_put_aside_is_put_back(tmp_path: Path) -> None:
    """The process was killed after the old engine was moved away and before the new one came."""
    out = tmp_path / "engine"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    code = (
        "import seekforge.common.files as files\n"
        "from unittest import mock\n"
        "def stop(self, target):\n"
        " import os\n"
        " if Path(target).name == 'engine': " + WAIT + "\n"
        " os.rename(self, target)\n"
        f"with mock.patch.object(Path, 'rename', stop), atomic_folder(Path({str(out)!r}), force=True): pass"
    )
    with child(code) as process:
        assert not out.exists()
        kill(process)
    sweep(tmp_path)
    assert (out / "manifest.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "tmp"]


def test_a_half_written_file_is_removed(tmp_path: Path) -> None:
    with child(f"with temporary_file(Path({str(tmp_path / 'index.json')!r})): {WAIT}") as process:
        kill(process)
    assert len(list(tmp_path.glob(".index.json.*"))) == 1
    replace_file(tmp_path / "other.json", b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "tmp"]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").touch()
    (tmp_path / "seekforge-parity.1-abcdefgh.partial").symlink_to(precious)
    for name in ("seekforge-notes", "x.partial", ".x.partial", "a.12-short.partial", "a.b-abcdefgh.partial"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / ".fifo.1-abcdefgh.partial")
    before = sorted(tmp_path.iterdir())
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert (precious / "thesis").exists()


def test_links_inside_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").touch()
    left = tmp_path / "seekforge-parity.1-abcdefgh.partial"
    left.mkdir()
    (left / "link").symlink_to(precious)
    sweep(tmp_path)
    assert not left.exists()
    assert (precious / "thesis").exists()


def test_a_mapped_file_keeps_its_bytes_when_its_folder_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with atomic_folder(out) as folder:
        (folder / "weights.bin").write_bytes(b"old" * 5000)
    with (out / "weights.bin").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with atomic_folder(out, force=True, marker="weights.bin") as folder:
            (folder / "weights.bin").write_bytes(b"new")
        assert mapped[:] == b"old" * 5000
    assert (out / "weights.bin").read_bytes() == b"new"


def test_a_replaced_file_is_another_file_with_the_same_permissions(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    replace_file(path, b"old")
    path.chmod(0o640)
    with path.open("rb") as reader:
        replace_file(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(one.name for one in tmp_path.iterdir()) == ["manifest.json", "tmp"]
