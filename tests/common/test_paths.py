"""A name in an artifact opens a regular file of its own folder, or nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from seekforge.common.errors import ConfigError
from seekforge.common.paths import checkpoint_file, inside, name_fault, real_path, same_names

ODD_NAMES = [
    "", ".", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//x", "a//b", "a/", "./a", "a/./b", "C:\\x", "C:x",
    "..\\x", "a\\b", "a\0b", "a\nb", "\x1b[2J", "a\u202eb", "\ud800", "x" * 2000, "é" * 200, "a.", "a ", "a?", "a*",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    assert name_fault(name) is not None
    with pytest.raises(ConfigError, match=r"list\.json: the name of a file"):
        inside(tmp_path, name, error=ConfigError, where="list.json")


@pytest.mark.parametrize("name", ["a", "a.json", "encoding/tests/a b.json", ".hidden", "日本語.txt", "a..b", "..a"])
def test_a_plain_name_is_a_path_in_the_folder(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, error=ConfigError, where="list.json") == tmp_path / name


def test_links_and_odd_files_are_refused_and_links_inside_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "own").write_text("own")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "out_relative").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    (folder / "gone").symlink_to("/nonexistent/file")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "near").symlink_to("own")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    for name, words in {
        "out": "leads outside",
        "out_relative": "leads outside",
        "up/secret": "leads outside",
        "gone": "leads outside",
        "zero": "leads outside",
        "fifo": "is a FIFO",
        "sub": "is a folder",
        "loop": "symbolic links",
    }.items():
        with pytest.raises(ConfigError, match=words):
            inside(folder, name, error=ConfigError, where="list.json")
    assert inside(folder, "near", error=ConfigError, where="list.json").read_text() == "own"
    (tmp_path / "alias").symlink_to(folder)  # the folder itself is the user's to choose
    assert inside(tmp_path / "alias", "own", error=ConfigError, where="list.json").read_text() == "own"


def test_names_that_are_one_file_on_some_disks_are_found() -> None:
    assert same_names(["a", "b/c", "B/C"]) == ("b/c", "B/C")
    assert same_names(("a", "b", "a")) == ("a", "a")
    assert same_names(["a", "b", "a/b"]) is None


def test_links_of_a_download_tool_are_followed_and_others_are_not(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "main"
    blob = tmp_path / "models--o--n" / "blobs" / ("0123456789abcdef" * 4)
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to(Path("../..") / "blobs" / blob.name)
    (snapshot / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    (snapshot / "generation_config.json").symlink_to(blob.parent)
    assert checkpoint_file(snapshot, "tokenizer.json", error=ConfigError).read_text() == "{}"
    with pytest.raises(ConfigError, match="leads outside"):
        checkpoint_file(snapshot, "tokenizer_config.json", error=ConfigError)
    with pytest.raises(ConfigError, match="is a folder"):
        checkpoint_file(snapshot, "generation_config.json", error=ConfigError)


def test_links_that_loop_have_a_place(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("d")
    assert real_path(tmp_path / "a").parent == tmp_path.resolve()
    assert real_path(tmp_path / "c") == tmp_path.resolve() / "d"


def test_no_path_from_outside_goes_to_a_method_that_raises_of_loops() -> None:
    """`Path.resolve` ends in a RuntimeError up to Python 3.12."""
    root = Path(__file__).resolve().parents[2]
    sources = [path for folder in ("exporter", "plugins", "runtime") for path in (root / folder).rglob("*.py")]
    found = [path for path in sources if re.search(r"(?<!\(__file__\))\.resolve\(\)", path.read_text(encoding="utf-8"))]
    assert sources and not found
