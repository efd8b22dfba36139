"""Files of tasks: what is read, what is right, and that anything else is one line with its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seekforge.common.errors import ConfigError
from seekforge.formats import quality
from seekforge.formats.quality import PromptRow, TaskQuality, TextRow, read_tasks

SUM = {"task": "arithmetic", "prompt": "1+1=<think>", "answer": "2", "match": "final", "max_tokens": 8}
TEXT = {"task": "english", "text": "It is a truth"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_tasks(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def test_rows_are_read_in_order_with_their_lines(tmp_path: Path) -> None:
    tasks = read_tasks(write(tmp_path / "tasks.jsonl", SUM, "", TEXT, SUM | {"match": "exact"}))
    assert [type(row) for row in tasks.rows] == [PromptRow, TextRow, PromptRow] and tasks.lines == (1, 3, 4)
    assert tasks.tasks == ("arithmetic", "english") and tasks.of("arithmetic") == [0, 2]
    assert tasks.has_answers("arithmetic") and not tasks.has_answers("english")


@pytest.mark.parametrize(
    ("match", "prompt", "completion", "right"),
    [
        ("exact", "1+1=", " 2\n", True),
        ("exact", "1+1=", "2 or so", False),
        ("exact", "1+1=<think>", "1, 2</think>2", False),
        ("final", "1+1=<think>", "1, 2</think>2", True),
        ("final", "1+1=<think>", "a</think>b</think> 2", True),
        ("final", "1+1=<think>", "2", False),  # a thought that never ended
        ("final", "1+1=<think>", "1</think>3", False),
        ("final", "1+1=</think>", "2", True),
        ("final", "<think>one</think>1+1=<think>", "2", False),
    ],
)
def test_an_answer_is_compared_as_its_row_says(match: Any, prompt: str, completion: str, right: bool) -> None:
    row = PromptRow(task="sum", prompt=prompt, answer="2", match=match, max_tokens=8)
    assert row.is_right(completion) is right


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "Expecting"),
        ("[1]", "expected an object with the keys task, prompt, answer, match, max_tokens"),
        ("1" * 30, "more than 64 bits"),
        ("[" * 300, "nested 300 deep"),
        ('{"task": "a", "task": "b", "text": "c"}', "names 'task' twice"),
        ('{"task": "a", "text": "\\ud800"}', "surrogate"),
        (TEXT | {"extra": 1}, "unknown key 'extra'"),
        (TEXT | {"text": " "}, "key 'text': is empty"),
        (TEXT | {"text": 3}, "key 'text': is 3, expected text"),
        (TEXT | {"task": "a=b"}, "key 'task': is 'a=b', expected at most 64 letters"),
        (TEXT | {"task": "x" * 65}, "key 'task'"),
        (TEXT | {"task": "a\u001b[31m"}, "key 'task'"),
        ({"task": "a", "prompt": "b"}, "key 'answer': is missing"),
        (SUM | {"match": "fuzzy"}, "expected one of 'exact', 'final'"),
        (SUM | {"max_tokens": 0}, "key 'max_tokens': is 0, expected at least 1"),
        (SUM | {"max_tokens": 10**9}, "expected at most 65536"),
        (SUM | {"max_tokens": True}, "expected a whole number"),
        (SUM | {"task": "english"}, "task 'english' has texts and prompts"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, row: Any, words: str) -> None:
    path = write(tmp_path / "tasks.jsonl", TEXT, row)
    line = refusal(path)
    assert line.startswith(f"{path}, line 2: ") and words in line and "write one object a line" in line


def test_what_is_no_file_of_tasks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be read (No such file" in refusal(tmp_path / "none")
    assert "cannot be read (is a folder" in refusal(tmp_path)
    assert "holds no task" in refusal(write(tmp_path / "empty", "", " "))
    monkeypatch.setattr(quality, "MOST_LINE_BYTES", 64)
    assert "line 2: has more than 64 bytes" in refusal(write(tmp_path / "long", TEXT, TEXT | {"text": "a" * 80}))
    monkeypatch.setattr(quality, "MOST_ROWS", 2)
    assert "line 3: is more than 2 rows" in refusal(write(tmp_path / "many", TEXT, TEXT, TEXT))
    monkeypatch.setattr(quality, "MOST_BYTES", 10)
    assert "expected at most 10" in refusal(write(tmp_path / "large", TEXT))


def test_perplexity_follows_from_the_likelihood() -> None:
    assert TaskQuality(task="a", num_rows=1, num_tokens=3, nll=0.0).perplexity == 1
    assert TaskQuality(task="a", num_rows=1, num_tokens=3, nll=2000.0).perplexity < float("inf")
    assert TaskQuality(task="a", num_rows=1, num_tokens=3, score=1.0).perplexity is None
