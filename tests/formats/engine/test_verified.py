"""What is remembered of a file holds while nobody wrote to it, and no longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from seekforge.formats.engine import verified


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "verified.json"
    monkeypatch.setenv(verified.VARIABLE, str(path))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    time.sleep(0.05)
    return path


def test_what_is_remembered_is_recalled(memory: Path) -> None:
    assert verified.recall() == {}
    verified.remember({"a": "1"})
    verified.remember({"b": "2", "a": "3"})
    assert verified.recall() == {"a": "3", "b": "2"}
    assert [path.name for path in memory.parent.iterdir()] == ["verified.json"]


def test_only_the_latest_are_kept(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "_MOST", 3)
    for number in range(5):
        verified.remember({str(number): "x"})
    assert list(verified.recall()) == ["2", "3", "4"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "files": {"a": "1"}}', '{"format": 1, "files": 3}'])
def test_a_damaged_memory_knows_nothing_and_is_replaced(memory: Path, text: str) -> None:
    memory.parent.mkdir()
    memory.write_text(text)
    assert verified.recall() == {}
    verified.remember({"a": "1"})
    assert verified.recall() == {"a": "1"}


def test_an_unwritable_place_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(verified.VARIABLE, str(tmp_path / "file" / "verified.json"))
    verified.remember({"a": "1"})
    assert verified.recall() == {}


def test_set_to_nothing_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(verified.VARIABLE, "")
    verified.remember({"a": "1"})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv(verified.VARIABLE)
    verified.remember({"a": "1"})
    assert [path.name for path in (tmp_path / "seekforge").iterdir()] == ["verified.json"]


def test_a_write_that_keeps_size_and_mtime_makes_another_file(file: Path) -> None:
    before, times = verified.identity(file), file.stat()
    assert before is not None and verified.identity(file) == before
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    time.sleep(0.05)
    assert verified.identity(file) != before


def test_another_file_in_its_place_is_another(file: Path, tmp_path: Path) -> None:
    before = verified.identity(file)
    other = tmp_path / "other"
    other.write_bytes(b"weights")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    time.sleep(0.05)
    assert verified.identity(file) not in (None, before)


def test_a_file_that_was_written_just_now_is_not_known(tmp_path: Path) -> None:
    """It could be written again within the same tick of the file system's clock."""
    path = tmp_path / "fresh"
    path.write_bytes(b"1")
    assert verified.identity(path) is None
