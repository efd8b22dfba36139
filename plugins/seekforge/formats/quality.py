"""What the quality of a model is measured on, and what was measured: tasks with answers, and texts.

A file of tasks is JSONL. A line either has an answer, which is compared with what is generated greedily, or a text,
whose tokens are predicted one by one with the ones before them given:

    {"task": "arithmetic", "prompt": "…", "answer": "42", "match": "final", "max_tokens": 64}
    {"task": "english", "text": "…"}
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from seekforge.common.errors import ConfigError
from seekforge.common.reading import parse_json, read_bytes
from seekforge.common.records import Positive, Record, RecordError, Size, at_least, finite, shown

#: Most of a file: bytes, lines with a row, bytes of a line.
MOST_BYTES: Final = 64 << 20
MOST_ROWS: Final = 20_000
MOST_LINE_BYTES: Final = 1 << 20
#: Most tokens that an answer may ask for.
MOST_TOKENS: Final = 65_536
#: What ends a thought: a `final` answer is what comes behind it.
THINK_START: Final = "<think>"
THINK_END: Final = "</think>"


def _task(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
        raise RecordError(f"is {shown(value)}, expected at most 64 letters, digits and _ . - that begin with no mark")
    return value


def _some(value: str) -> str:
    if not value.strip():
        raise RecordError("is empty, expected text")
    return value


#: Forms of the PyTorch model that are measured beside engines.
FormName = Literal["exact", "fp8", "bf16", "kv_fp8", "kv_bf16", "nvfp4", "nvfp4_experts", "kv_nvfp4"]
TaskName = Annotated[str, _task]
_Text = Annotated[str, _some]


class TextRow(Record):
    """A text that is predicted token by token, as it stands: special tokens written in it are those tokens.

    Attributes:
        task: what results are gathered under.
        text: what is predicted; the first token is only read.
    """

    task: TaskName
    text: _Text


class PromptRow(Record):
    """A prompt with the answer that it should get.

    Attributes:
        task: what results are gathered under.
        prompt: what is continued greedily; special tokens written in it are those tokens.
        answer: what is expected.
        match: `exact`: of the whole completion; `final`: of what comes behind its thought. White space around either is
            no part of it, the end of sequence is not either.
        max_tokens: most tokens to generate.
    """

    task: TaskName
    prompt: _Text
    answer: _Text
    match: Literal["exact", "final"]
    max_tokens: Annotated[int, at_least(1, MOST_TOKENS)]

    def is_right(self, completion: str) -> bool:
        """Whether a completion gives the answer."""
        if self.match == "exact":
            return completion.strip() == self.answer.strip()
        _, end, final = completion.rpartition(THINK_END)
        if not end and self.prompt.rfind(THINK_START) > self.prompt.rfind(THINK_END):
            return False  # the thought never ended
        return final.strip() == self.answer.strip()


QualityRow = TextRow | PromptRow


@dataclass(frozen=True)
class QualityTasks:
    """A file of tasks.

    Attributes:
        path: where it was read.
        rows: the rows, in order.
        lines: the number of each row's line.
        sha256: the digest of the file.
    """

    path: Path
    rows: tuple[QualityRow, ...]
    lines: tuple[int, ...]
    sha256: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order of their first row."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def of(self, task: str) -> list[int]:
        """Return the numbers of a task's rows."""
        return [number for number, row in enumerate(self.rows) if row.task == task]

    def has_answers(self, task: str) -> bool:
        """Whether a task has a score; else it has a perplexity."""
        return isinstance(self.rows[self.of(task)[0]], PromptRow)


def read_tasks(path: Path) -> QualityTasks:
    """Read a file of tasks.

    Raises:
        ConfigError: it cannot be read, or a line is none of the two rows; it names file and line.
    """
    again = 'write one object a line: {"task", "prompt", "answer", "match", "max_tokens"} or {"task", "text"}'
    try:
        raw = read_bytes(path, most=MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected JSONL with tasks") from None
    rows: list[QualityRow] = []
    lines: list[int] = []
    kinds: dict[str, type[QualityRow]] = {}
    for number, line in _lines(path, raw):
        try:
            row = _row(line)
            kind = kinds.setdefault(row.task, type(row))
            if type(row) is not kind:
                raise RecordError(f"task {row.task!r} has texts and prompts; give one of them another name")
            if len(rows) == MOST_ROWS:
                raise RecordError(f"is more than {MOST_ROWS:,} rows; split the file")
        except ValueError as error:  # a RecordError is one
            raise ConfigError(f"{path}, line {number}: {error}; {again}") from None
        rows.append(row)
        lines.append(number)
    if not rows:
        raise ConfigError(f"{path}: holds no task; {again}")
    return QualityTasks(path, tuple(rows), tuple(lines), hashlib.sha256(raw).hexdigest())


def _lines(path: Path, raw: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if len(line) > MOST_LINE_BYTES:
            raise ConfigError(f"{path}, line {number}: has more than {MOST_LINE_BYTES:,} bytes; split the text")
        if line.strip():
            yield number, line


def _row(line: bytes) -> QualityRow:
    value = parse_json(line)
    if isinstance(value, dict) and "text" in value:
        return TextRow.model_validate(value)
    return PromptRow.model_validate(value)


# --- what was measured ----------------------------------------------------------------------------------------


class TaskQuality(Record):
    """What a model made of one task.

    Attributes:
        task: its name.
        num_rows: its rows.
        num_tokens: tokens that were predicted, or generated.
        nll: mean negative log-likelihood of a token of the texts, in nats; None where the task has answers.
        score: part of the prompts that got their answers; None where the task has texts.
    """

    task: TaskName
    num_rows: Positive
    num_tokens: Size
    nll: Annotated[float, finite] | None = None
    score: Annotated[float, finite] | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(nll), at most the largest float."""
        return None if self.nll is None else math.exp(min(self.nll, 709.0))


class Quality(Record):
    """What an engine was measured to do, with the bounds that it was held to when it was built.

    Attributes:
        tasks_sha256: the digest of the file of tasks.
        tasks: what it made of each.
        bounds: task -> smallest score, or largest perplexity, that was allowed.
    """

    tasks_sha256: str
    tasks: tuple[TaskQuality, ...]
    bounds: dict[str, float]
