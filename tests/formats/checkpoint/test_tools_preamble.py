"""The text about tools is the released one, and another is told without executing what holds it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from seekforge.formats.checkpoint.tools_preamble import ENCODING_FILE, TOOLS_PREAMBLE, preamble_difference, preamble_in


def test_it_is_the_released_text() -> None:
    assert len(TOOLS_PREAMBLE) == 1210
    digest = hashlib.sha256(TOOLS_PREAMBLE.encode()).hexdigest()
    assert digest == "0cc91e644b79c4f576bbe968ed31a1bc8f825c0a4617730109df29d07f75f79a"


def test_a_literal_is_read_wherever_it_stands() -> None:
    for source in (f"x = {TOOLS_PREAMBLE!r}", f"def f():\n    return {TOOLS_PREAMBLE!r}.format()"):
        assert preamble_in(source) == TOOLS_PREAMBLE
    assert preamble_in("x = 1") is None


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (f"T = {TOOLS_PREAMBLE!r}", None),
        (f"T = {TOOLS_PREAMBLE.replace('</functions>', '')!r}", "differs from DeepSeek-V3.2's from line 32 on"),
        (f"T = {TOOLS_PREAMBLE + 'more'!r}", "differs from DeepSeek-V3.2's from line 33 on"),
        ("T = 1", "holds no text about tools"),
        ("T = (", "is no Python file"),
        ("(" * 100_000, "is no Python file"),
        ("T = '\0'", "is no Python file"),
    ],
)
def test_a_difference_is_one_sentence(source: str, sentence: str | None, tmp_path: Path) -> None:
    assert preamble_difference(tmp_path) is None
    (tmp_path / "encoding").mkdir()
    (tmp_path / ENCODING_FILE).write_text(source, encoding="utf-8")
    difference = preamble_difference(tmp_path)
    assert difference is None if sentence is None else sentence in str(difference) and "\n" not in str(difference)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "encoding").mkdir()
    os.mkfifo(tmp_path / ENCODING_FILE)
    assert preamble_difference(tmp_path) is None
