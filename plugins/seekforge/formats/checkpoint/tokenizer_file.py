"""Read a `tokenizer.json`: what it does to text, and nothing that a training run left in it.

Truncation and padding are settings of whoever saved the file. They would cut or fill every prompt in silence, so they
are switched off here, for all who read one. A post-processor's begin of sequence is not added either: callers encode
with `add_special_tokens=False`, since DeepSeek's prompts hold that token as text.

The library that reads is Rust, whose panics are BaseExceptions that hardly anybody catches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from seekforge.common.errors import SeekforgeError
from seekforge.common.reading import parse_json, read_text
from seekforge.formats.checkpoint.split_patterns import expressions, slow_fault

#: Of the released model it has 8 MB.
_MOST_BYTES: Final = 256 << 20
#: Decoders that change nothing beside a byte-level one, unless the vocabulary has tokens such as <0x0A>.
_IDLE: Final = ("Fuse", "ByteFallback")


@dataclass(frozen=True)
class TokenizerFile:
    """An open tokenizer.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer` without truncation and padding.
        switched_off: what the file asks for and is not done, a phrase each.
    """

    tokenizer: Any
    switched_off: tuple[str, ...]


def read_tokenizer(path: Path, *, error: type[SeekforgeError], again: str) -> Any:
    """Return the `tokenizers.Tokenizer` of a file, without truncation and padding; see `open_tokenizer`."""
    return open_tokenizer(path, error=error, again=again).tokenizer


def open_tokenizer(path: Path, *, error: type[SeekforgeError], again: str) -> TokenizerFile:
    """Read a tokenizer.

    Args:
        path: the path of a tokenizer.json.
        error: what to raise.
        again: what to do about it, for the message.

    Raises:
        SeekforgeError: `error`, if it cannot be read, describes no tokenizer, or decodes to something else than bytes.
    """
    try:
        text = read_text(path, most=_MOST_BYTES)
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise error(f"{path}: cannot be read ({reason}); {again}") from None
    try:
        content = parse_json(text)
        slow = next(((one, fault) for one in expressions(content) if (fault := slow_fault(one)) is not None), None)
        if slow is not None:
            raise ValueError(f"its expression {slow[0]!r:.80} {slow[1]}, so a prompt could take minutes")
        tokenizer = guarded(Tokenizer.from_str, text)
    except Exception as problem:  # tokenizers raises bare Exception
        raise error(f"{path}: cannot be read as a tokenizer ({problem}); {again}") from None
    other = _other_decoder(tokenizer)
    if other is not None:
        raise error(f"{path}: its decoder is {other}, expected ByteLevel; {again}")
    off: list[str] = []
    if tokenizer.truncation is not None:
        off.append(f"truncation to {tokenizer.truncation.get('max_length')} tokens")
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
        length = tokenizer.padding.get("length")
        off.append("padding" if length is None else f"padding to {length} tokens")
        tokenizer.no_padding()
    added = tokenizer.num_special_tokens_to_add(False)
    if added:
        off.append(f"a post-processor that adds {added} special token{'s' if added > 1 else ''} to every text")
    return TokenizerFile(tokenizer, tuple(off))


def without_limits(raw: bytes) -> bytes:
    """Return the bytes of a tokenizer.json without truncation and padding; the same bytes where it has none."""
    content = parse_json(raw)
    if content.get("truncation") is None and content.get("padding") is None:
        return raw
    return json.dumps(content | {"truncation": None, "padding": None}, ensure_ascii=False).encode()


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


def _other_decoder(tokenizer: Any) -> str | None:
    """Return the name of a decoder that does something else than turn characters into bytes; None: there is none."""
    if tokenizer.decoder is None:
        return "NoneType"
    form = json.loads(tokenizer.decoder.__getstate__())
    if form.get("type") != "Sequence":
        return None if form.get("type") == "ByteLevel" else str(form.get("type"))
    kinds = [part.get("type") for part in form.get("decoders", [])]
    idle = [kind for kind in kinds if kind != "ByteLevel"]
    fallback = "ByteFallback" in idle and tokenizer.token_to_id("<0x0A>") is not None
    if kinds.count("ByteLevel") == 1 and all(kind in _IDLE for kind in idle) and not fallback:
        return None
    return f"Sequence of {', '.join(map(str, kinds)) or 'nothing'}"
