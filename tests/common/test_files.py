"""Folders appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from seekforge.common.errors import OutputError
from seekforge.common.files import atomic_folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert leftovers(out.parent) == []


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "program.json").write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_folder(out, force=True, marker="program.json") as folder:
        (folder / "program.json").write_text("new")
        raise ValueError("stop")
    assert (out / "program.json").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_force_replaces_and_plain_refuses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "program.json").write_text("old")
    with pytest.raises(OutputError, match="--force"), atomic_folder(out):
        pass
    with atomic_folder(out, force=True, marker="program.json") as folder:
        (folder / "program.json").write_text("new")
    assert (out / "program.json").read_text() == "new"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_an_interrupt_between_two_renames_loses_nothing(
    after: int, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the old folder was put aside, and after the new one took its place."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "program.json").write_text("old")
    real, renamed = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        renamed.append(target)
        done = real(self, target)
        if len(renamed) == after:
            raise kind(errno.EIO, "stop")
        return done

    with pytest.raises((KeyboardInterrupt, OutputError)), atomic_folder(out, force=True) as folder:
        (folder / "program.json").write_text("new")
        monkeypatch.setattr(Path, "rename", interrupted)
    assert (out / "program.json").read_text() == {1: "old", 2: "new"}[after]
    assert leftovers(tmp_path) == []


def test_force_refuses_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"no program\.json"), atomic_folder(out, force=True, marker="program.json"):
        pass
    assert (out / "thesis.txt").exists()


def test_an_empty_folder_is_fine_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert (tmp_path / "empty" / "a").exists()
    with pytest.raises(OutputError, match="is a file"), atomic_folder(tmp_path / "empty" / "a"):
        pass


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written")])
def test_a_write_error_is_one_clear_line(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(OutputError, match=message), atomic_folder(tmp_path / "out"):
        raise OSError(code, "some reason")
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    missing = tmp_path / "checkpoint" / "model.safetensors"
    with (
        pytest.raises(OutputError, match=rf"^{missing}: no such file or directory; nothing was written to .*engine$"),
        atomic_folder(tmp_path / "engine"),
    ):
        missing.read_bytes()
    with (
        pytest.raises(OutputError, match=r"engine: cannot be written \(No such"),
        atomic_folder(tmp_path / "engine") as out,
    ):
        (out / "gone" / "weights.bin").write_bytes(b"")
    assert not list(tmp_path.iterdir())


def test_two_commands_into_one_folder_do_not_mix_and_the_later_one_is_told(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with pytest.raises(OutputError, match="another command wrote it meanwhile"), atomic_folder(out) as late:
        (late / "whose").write_text("late")
        with atomic_folder(out) as early:
            (early / "whose").write_text("early")
    assert (out / "whose").read_text() == "early"
    with atomic_folder(out, force=True) as late:
        (late / "whose").write_text("late")
    assert (out / "whose").read_text() == "late"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"], "nothing is left beside it"
    empty = tmp_path / "empty"
    empty.mkdir()
    with atomic_folder(empty) as folder:
        (folder / "whose").write_text("mine")
    assert (empty / "whose").read_text() == "mine"
