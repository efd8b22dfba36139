"""What `serve` is told is looked at before it serves: a server that was to have keys is never open to all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.runtime.cli.main import main


def refuse(*args: object) -> str:
    done = CliRunner().invoke(main, ["serve", *map(str, args)])
    assert done.exit_code == 2 and done.stdout == "", done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("option", ["--api-key-file", "--admin-key-file"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no key"),
        (b"\n \r\n", "holds no key"),
        (b"\xff", "is no UTF-8"),
        ("a\u2028b".encode(), "no header can carry"),
        (b"a b", "no header can carry"),
        (bytes(2 << 20), "expected at most"),
        (None, "is a FIFO"),
    ],
    ids=["empty", "blank", "Latin", "separator", "space", "large", "FIFO"],
)
def test_a_file_without_keys_is_refused(option: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    if content is None:
        os.mkfifo(keys)
    else:
        keys.write_bytes(content)
    assert words in refuse(tmp_path / "engine", option, keys)


def test_an_engine_that_is_a_link_to_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "engine").symlink_to("engine")
    assert "symbolic links" in refuse(tmp_path / "engine", "--port", 0, "--quiet")
