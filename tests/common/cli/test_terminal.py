"""Foreign text is shown and never acts, on any stream."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from seekforge.common.cli import terminal

#: Characters that a terminal obeys, or that let one text look like another.
ACTIVE = [
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C, 0x2028, 0x2029)),
    "\udcff",
    "\ud800",
]


def test_every_active_character_is_an_escape() -> None:
    for char in ACTIVE:
        seen = terminal.shown(f"a{char}b")
        assert seen.startswith("a\\") and seen.endswith("b") and seen.isascii() and seen.isprintable(), repr(char)


def test_no_control_or_half_character_of_unicode_gets_through() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    left = terminal.shown(every)
    assert not {char for char in left if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")}
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not {char for char in left if unicodedata.bidirectional(char) in directions}


@pytest.mark.parametrize("text", ["model.layers.0", "日本語 ｜ é", "👩‍💻", "C:\\x1b", "[bold]", ""])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert terminal.shown(text) == text


def test_showing_twice_is_showing_once() -> None:
    once = terminal.shown("".join(ACTIVE))
    assert terminal.shown(once) == once


def test_a_message_is_one_line() -> None:
    assert terminal.one_line("a\n b\t\x1b[31mc\r\n\x85d") == "a b \\x1b[31mc d"


class Stream(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def test_generated_text_is_raw_in_a_pipe_and_harmless_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n\tb\x1b]0;title\x07\u202ec"
    for tty, expected in ((False, text), (True, "a\n\tb\\x1b]0;title\\x07\\u202ec")):
        stream = Stream(tty)
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.write_generated(text)
        assert stream.getvalue() == expected


@pytest.mark.parametrize("indent", [None, 1])
def test_json_holds_the_same_values_and_nothing_active(indent: int | None) -> None:
    value = {"".join(ACTIVE): ["".join(ACTIVE), {"é": "日本😀"}]}
    text = terminal.json_text(value, indent=indent)
    assert json.loads(text) == value and not set(ACTIVE) - {"\n"} & set(text)
    assert ("日本😀" in text and "\n" not in text) or indent


def python(script: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -c "$SCRIPT" {redirect}'

    return subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "SCRIPT": script, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_take_text_and_no_file_gets_it(redirect: str, tmp_path) -> None:
    script = (
        "from seekforge.common.cli import terminal\nterminal.prepare_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\nterminal.echo('out')\nterminal.echo('err', err=True)\n"
        "terminal.write_generated('x')\nfile.write('mine')\nfile.close()\n"
        "raise SystemExit(0 if terminal.flush_streams() else 3)"
    )
    done = python(script, redirect)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_stream_that_cannot_hold_a_character_shows_its_escape(encoding: str) -> None:
    script = (
        "from seekforge.common.cli import terminal\nterminal.prepare_streams()\n"
        "terminal.echo('日…')\nterminal.write_json({'é': '日😀'})"
    )
    done = python(script, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "\\u65e5\\u2026" and json.loads(second) == {"é": "日😀"}


def test_a_full_disk_behind_stdout_is_noticed() -> None:
    script = (
        "from seekforge.common.cli import terminal\nimport sys\nterminal.prepare_streams()\nsys.stdout.write('x')\n"
        "raise SystemExit(7 if not terminal.flush_streams() else 0)"
    )
    done = python(script, ">/dev/full", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("name", ["a b", "-x", "--out", "it's", "$(x)", "a;b", "*", "~", "#a", "ä", "a/b", "-", "\\"])
def test_a_command_that_is_advised_has_the_same_words_for_a_shell(name: str) -> None:
    words = shlex.split(terminal.typed_command("export", Path(name), "--numerics", "exact"))
    assert words[:2] == ["seekforge", "export"] and words[3:] == ["--numerics", "exact"]
    assert Path(words[2]) == Path(name) and not words[2].startswith("-")
    assert terminal.typed(name) == words[2]
