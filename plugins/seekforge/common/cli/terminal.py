"""Text on its way out: whatever a file, a path or a model says is shown, and never acts.

A terminal obeys what it is sent: ESC and C1 sequences recolor, rename and overwrite, bidirectional controls let one
name look like another. `shown` is the one place where such characters become visible escapes; `echo`, `write_json` and
`console` go through it. Nothing here imports more than the standard library, since every command and
every `--help` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, TextIO

#: Controls (C0, DEL, C1), marks and overrides of direction, line and paragraph separators, invisible tags, halves of
#: surrogate pairs.
_ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shown(text: object, *, keep: str = "") -> str:
    """Return text that a terminal shows and does not obey.

    Args:
        text: anything; its `str`.
        keep: characters that stay as they are, such as the newlines of text that a model writes.

    Returns:
        The text with every active character written as Python writes it (`\\x1b`, `\\u202e`). What is shown once is
        not changed by being shown again.
    """
    return _ACTIVE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def one_line(message: object) -> str:
    """Return a message as one line: runs of white space become one space, and the rest is `shown`."""
    return shown(" ".join(str(message).split()))


def typed(path: Path | str) -> str:
    """Return a path as the words of a command have it: none is taken for an option."""
    text = os.fspath(path)
    return f"./{text}" if text.startswith("-") else text


def typed_command(*words: object) -> str:
    """Return a seekforge command as a shell takes it, whatever is in the paths (`Path`) among its words."""
    return shlex.join(["seekforge", *(typed(word) if isinstance(word, Path) else str(word) for word in words)])


def echo(line: object = "", *, err: bool = False) -> None:
    """Print one line to stdout, or stderr. A newline inside it came from outside, and is shown."""
    write(f"{shown(line)}\n", err=err)


def write(text: str, *, err: bool = False) -> None:
    """Write text that holds nothing active, or nothing but our own newlines, and flush."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        stream.write(text)
        stream.flush()


def write_generated(text: str, *, err: bool = False) -> None:
    """Write what a model generated, to stdout or stderr: raw into a pipe or file, `shown` to a terminal."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None and text:  # the layout of a text is kept
        write(shown(text, keep="\n\t") if stream.isatty() else text, err=err)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return JSON without a character that acts; what reads it gets the same values."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # json.dumps wrote the newlines of `indent` and escaped those in strings
    return _ACTIVE.sub(lambda match: match[0] if match[0] == "\n" else _json_escape(match[0]), text)


def write_json(value: Any, *, indent: int | None = None) -> None:
    """Print one JSON value and a newline to stdout; in ASCII where the stream cannot hold every character."""
    text = json_text(value, indent=indent)
    encoding = str(getattr(sys.stdout, "encoding", "") or "utf-8").lower().replace("-", "")
    if not encoding.startswith("utf"):
        text = "".join(char if char.isascii() else _json_escape(char) for char in text)
    write(text + "\n")


def prepare_streams() -> None:
    """Make the standard streams usable, whatever they are.

    A closed one is opened on nothing, so that no file which a command opens takes its number and gets its text. One
    that cannot hold a character shows its escape.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def flush_streams() -> bool:
    """Flush stdout and stderr. Return whether their readers took everything; what they did not take is dropped."""
    whole = True
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                whole = False
                drop(stream)
    return whole


def drop(stream: TextIO) -> None:
    """Let what is left in a stream go nowhere: Python flushes once more at exit, and would complain."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def _escape(char: str) -> str:
    code = ord(char)
    if char in _SHORT:
        return _SHORT[char]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(char: str) -> str:
    code = ord(char)
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
