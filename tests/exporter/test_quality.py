"""Tasks as tokens, what comes back as scores, and bounds: what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seekforge.common.errors import ConfigError, EngineError, OptionError
from seekforge.exporter.quality import encode, misses, read_bounds, run_engine
from seekforge.formats.quality import QualityTasks, TaskQuality, read_tasks
from seekforge.formats.quality_run import RunRequest

ROWS = (
    {"task": "sums", "prompt": "one and one", "answer": "two", "match": "exact", "max_tokens": 4},
    {"task": "english", "text": "It is a truth universally acknowledged."},
    {"task": "sums", "prompt": "two and two", "answer": "four", "match": "exact", "max_tokens": 6},
    {"task": "english", "text": "It is."},
)


@pytest.fixture
def tasks(tmp_path: Path) -> QualityTasks:
    return write(tmp_path, *ROWS)


def write(folder: Path, *rows: dict[str, Any]) -> QualityTasks:
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_tasks(path)


def test_every_task_gets_its_score_or_likelihood(tasks: QualityTasks, tiny_checkpoint: Path) -> None:
    encoded = encode(tasks, tiny_checkpoint / "tokenizer.json", longest=100)
    assert [row.max_tokens for row in encoded.rows] == [4, 0, 6, 0]
    ids = [row.ids for row in encoded.rows]
    completion = encoded.tokenizer.encode("two", add_special_tokens=False).ids
    sums, english = encoded.score([[*completion, 1], (), [7, 8], ()], [None, 12.0, None, 3.0], [1])
    assert (sums.task, sums.num_rows, sums.score, sums.nll) == ("sums", 2, 0.5, None)
    assert sums.num_tokens == len(completion) + 3
    assert english.num_tokens == len(ids[1]) + len(ids[3]) - 2
    assert english.nll == pytest.approx(15.0 / english.num_tokens) and english.score is None


def test_what_does_not_fit_is_named_by_its_line(tasks: QualityTasks, tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tiny_checkpoint / "tokenizer.json"
    longest = max(len(row.ids) + max(row.max_tokens, 1) for row in encode(tasks, tokenizer, longest=1000).rows)
    encode(tasks, tokenizer, longest=longest)
    with pytest.raises(ConfigError, match=rf"line \d: needs {longest} tokens .*, {longest - 1} are accepted"):
        encode(tasks, tokenizer, longest=longest - 1)
    with pytest.raises(ConfigError, match="line 1: encodes to 1 tokens, expected at least 2"):
        encode(write(tmp_path, {"task": "a", "text": "a"}), tokenizer, longest=10)
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        encode(tasks, tmp_path / "none.json", longest=10)


def test_bounds_are_read_and_missed(tasks: QualityTasks) -> None:
    assert read_bounds(("sums=0.5", "english=12"), tasks) == {"sums": 0.5, "english": 12.0}
    assert read_bounds(("sums=5e-1", "english=1e+22"), tasks) == {"sums": 0.5, "english": 1e22}
    results = (
        TaskQuality(task="sums", num_rows=2, num_tokens=5, score=0.5),
        TaskQuality(task="english", num_rows=2, num_tokens=9, nll=2.0),
    )
    assert misses(results, {}) == [] and misses(results, {"sums": 0.5, "english": 7.4}) == []
    low, high = misses(results, {"sums": 0.51, "english": 7.3})
    assert low == "sums has score 0.5 in 2 rows, expected at least 0.51"
    assert high == "english has perplexity 7.389, expected at most 7.3"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sums", "expected TASK=BOUND"),
        ("sums=", "expected TASK=BOUND"),
        ("sums=nan", "expected TASK=BOUND"),
        ("sums=-1", "expected TASK=BOUND"),
        ("sums=1_0", "expected TASK=BOUND"),
        ("sums=1.5", "a score is at most 1"),
        ("english=0.5", "a perplexity is at least 1"),
        ("english=" + "9" * 400, "a perplexity is at least 1"),
        ("recall=0.5", "names task 'recall', .*tasks.jsonl has sums, english"),
    ],
)
def test_a_bound_that_is_none_is_refused(tasks: QualityTasks, spec: str, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        read_bounds((spec,), tasks)
    assert len(str(caught.value)) < 300
    with pytest.raises(OptionError, match="'sums' twice"):
        read_bounds(("sums=0.5", "sums=0.6"), tasks)


def test_an_engine_that_cannot_be_run_is_named(tasks: QualityTasks, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = encode(tasks, tiny_checkpoint / "tokenizer.json", longest=100).rows
    with pytest.raises(EngineError, match=r"^mine: the runtime could not run it: mine/manifest\.json"):
        run_engine(tmp_path / "none", RunRequest(rows=rows), tmp_path, name="mine", say=print)
