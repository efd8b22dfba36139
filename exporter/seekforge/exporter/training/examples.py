"""A file of one's own examples, for fine-tuning: JSONL, a prompt and what is to be written, or a text, in each line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import ConfigError
from seekforge.common.reading import parse_json, read_bytes
from seekforge.common.records import Record, RecordError
from seekforge.exporter.training.tasks import Example, Piece

#: Most bytes of a file.
_MOST_BYTES: Final = 256 << 20


class _PromptLine(Record):
    prompt: str
    completion: str


class _TextLine(Record):
    text: str


def read_examples(path: Path) -> list[Example]:
    """Read a file of examples; special tokens written in it are those tokens.

    A line is {"prompt": "…", "completion": "…"}, of which the completion is learned, or {"text": "…"}, learned whole.

    Raises:
        ConfigError: it cannot be read, holds no line, or a line is something else.
    """
    try:
        lines = read_bytes(path, most=_MOST_BYTES).split(b"\n")  # not at U+2028, which texts may hold
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    examples = [_example(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise ConfigError(f"{path}: holds no example, expected a line of JSON for each")
    return examples


def _example(path: Path, number: int, line: bytes) -> Example:
    try:
        raw: Any = parse_json(line)
        if isinstance(raw, dict) and "text" in raw:
            return [Piece(_TextLine.model_validate(raw).text, True)]
        one = _PromptLine.model_validate(raw)
    except RecordError as error:
        raise ConfigError(f"{path}: line {number}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: line {number}: is no JSON ({error})") from None
    return [Piece(one.prompt), Piece(one.completion, True)]
