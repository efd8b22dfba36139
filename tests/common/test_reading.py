"""What is no plain file, or JSON that would end a reader, is one of the two errors that readers expect."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from seekforge.common.reading import MAX_DEPTH, parse_json, read_bytes, read_json

HALF = "half of a surrogate pair"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested 100000 deep"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nested 3000 deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"nested {MAX_DEPTH + 1} deep"),
        ('{"a": 1, "b": 2, "a": 3}', "names 'a' twice"),
        ('[{"x": {"k": 1, "k": 1}}]', "names 'k' twice"),
        ("[NaN]", "holds NaN"),
        ("-Infinity", "holds -Infinity"),
        ("9223372036854775808", "more than 64 bits"),
        ("-9223372036854775809", "more than 64 bits"),
        ("9" * 5000, "more than 64 bits"),
        ("1e999", "out of range"),
        ("1" * 400 + ".5", "out of range"),
        (r'"\ud800"', HALF),
        (r'{"\uDFFF": 1}', HALF),
        (r'"\ude00\ud83d"', HALF),
        (b'"\xff"', "byte 1 is no UTF-8"),
        (b'"\xed\xa0\x80"', "byte 1 is no UTF-8"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
        ('"' + "\\" * 200_001, "Unterminated string"),
        ('"' + '\\"' * 200_000, "Unterminated string"),
        ('{"a": 1} x', "Extra data"),
    ],
)
def test_json_that_would_end_a_reader_is_a_value_error(text: str | bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        parse_json(text)
    assert not isinstance(caught.value, UnicodeError)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -(2**63), 2**63 - 1, 0.30000000000000004, 1e-300, 1.7e308], "": None, "b": '[{[[\\"]'},
        ["[" * 1000, '"' * 7, "\\" * 5, "\u0000"],
        "emoji 🎉 and 日本語",
        [[]] * 100_000,
    ],
)
def test_json_that_is_well_formed_is_what_it_says(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_nesting_up_to_the_bound_is_read() -> None:
    value = parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        (value,) = value
    assert value == []


def test_files_that_are_no_regular_ones_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        started = time.monotonic()
        for name, words in {
            "fifo": "is a FIFO",
            "folder": "is a folder",
            "zero": "is a device",
            "socket": "is a socket",
            "loop": "symbolic links",
            "absent": "No such file",
        }.items():
            with pytest.raises(OSError, match=words):
                read_json(tmp_path / name)
        assert time.monotonic() - started < 5  # none of them waits for ever


def test_a_file_larger_than_its_kind_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(OSError, match="has 1,073,741,824 bytes, expected at most 16,777,216"):
        read_json(tmp_path / "config.json")
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bytes(tmp_path / "small", most=5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, expected at most 4"):
        read_bytes(tmp_path / "small", most=4)
