"""Read a tokenizer.json. The library that does is Rust, whose panics are BaseExceptions that hardly anybody catches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from seekforge.plugins.errors import SeekforgeError
from seekforge.plugins.formats.reading import parse_json, read_text

#: Of the released model it has 8 MB.
_MOST_BYTES: Final = 256 << 20


def read_tokenizer(path: Path, *, error: type[SeekforgeError], again: str) -> Any:
    """Return the `tokenizers.Tokenizer` of a file.

    Args:
        path: of a tokenizer.json.
        error: what to raise.
        again: what to do about it, for the message.

    Raises:
        SeekforgeError: `error`, if it cannot be read or describes no tokenizer.
    """
    try:
        text = read_text(path, most=_MOST_BYTES)
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise error(f"{path}: cannot be read ({reason}); {again}") from None
    try:
        parse_json(text)
        return guarded(Tokenizer.from_str, text)
    except Exception as problem:  # tokenizers raises bare Exception
        raise error(f"{path}: cannot be read as a tokenizer ({problem}); {again}") from None


def guarded(call: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function of the library.

    Raises:
        RuntimeError: it panicked, in place of the exception that nothing but a bare `except` would see.
    """
    try:
        return call(*arguments, **options)
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizer library failed: {problem}") from None
