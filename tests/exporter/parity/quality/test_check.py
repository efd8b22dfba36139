"""`parity --quality` as people call it: the table, its JSON, its page, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.support.made_once import made_once
from tests.support.random_nano import random_nano

from seekforge import parity
from seekforge.exporter.parity.quality.check import QualityReport, _watched
from seekforge.exporter.parity.report.quality import cells, columns
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.quality_run import RunRow
from seekforge.runtime.cli import main as cli


def invoke(*args: str | Path) -> Result:
    result = CliRunner().invoke(cli.main, ["parity", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random nano model; do not write into it."""
    return random_nano(tmp_path_factory)


@pytest.fixture(scope="module")
def report(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The table of its engine and one form, made once."""

    def make(root: Path) -> None:
        tasks = root / "tasks.jsonl"
        tasks.write_text((nano / "tasks.jsonl").read_text() + "\n" + json.dumps(LONG), encoding="utf-8")
        line = [nano / "engine", "--checkpoint", nano / "checkpoint", "--quality", tasks]
        result = invoke(*line, "--forms", "nvfp4", "--threads", "1", "--html", root / "page.html", "--json")
        assert result.exit_code == 0, result.output
        (root / "report.json").write_text(result.stdout, encoding="utf-8")

    root = made_once(tmp_path_factory, "quality-report", make)
    return json.loads((root / "report.json").read_text()) | {"page": (root / "page.html").read_text(encoding="utf-8")}


#: More tokens than index_topk, so that indexers choose.
LONG = {"task": "english", "text": "It is a truth universally acknowledged. " * 6}


def test_the_report_has_engines_and_forms_beside_the_exact_model(report: dict[str, Any], nano: Path) -> None:
    made = QualityReport.model_validate({key: value for key, value in report.items() if key != "page"})
    exact, rounded, engine = made.entries
    assert [one.name for one in made.entries] == ["exact", "nvfp4", "engine"] and made.notes
    assert [task.task for task in exact.tasks] == ["sums", "english"] and made.tasks["num_rows"] == 4
    for one, other in zip(engine.tasks, exact.tasks, strict=True):
        assert (one.num_rows, one.num_tokens) == (other.num_rows, other.num_tokens)
    assert exact.tasks[1].nll == pytest.approx(engine.tasks[1].nll, rel=1e-5)  # exact numerics, f32 weights
    assert abs(exact.tasks[1].nll - rounded.tasks[1].nll) > 1e-4  # pyright: ignore
    assert exact.recall is not None and engine.recall is not None and rounded.recall is None
    assert engine.recall.inside == pytest.approx(exact.recall.inside, abs=2e-3) and 0 < exact.recall.inside < 1
    assert engine.drafts is not None and engine.speed is not None and exact.drafts is exact.speed is None
    manifest = load_manifest(nano / "engine")
    assert engine.cache_bytes_per_token == exact.cache_bytes_per_token == manifest.cache.bytes_per_block / 64
    assert rounded.weight_bytes < exact.weight_bytes < engine.weight_bytes


def test_the_table_and_the_page_show_what_the_report_has(report: dict[str, Any]) -> None:
    heads = columns(report)
    lines = [cells(report, entry) for entry in report["entries"]]
    assert heads[1:3] == ["sums", "english ppl"] and all(len(line) == len(heads) for line in lines)
    assert [line[0] for line in lines] == ["PyTorch exact", "PyTorch nvfp4", "engine"]
    assert "(" not in lines[0][2] and "(" in lines[1][2] and lines[0][3] == "—" and lines[2][3].endswith("%")
    page = report["page"]
    assert "http" not in page and "<script" not in page and page.count("<table>") == 3
    assert "PyTorch nvfp4" in page and "reference, no engine" in page


def test_several_engines_stand_beside_each_other_in_one_call(nano: Path) -> None:
    result = parity(
        [nano / "engine", nano / "program" / ".." / "engine"],
        checkpoint=nano / "checkpoint",
        quality=nano / "tasks.jsonl",
        threads=1,
    )
    assert result.passed is None and result.html is None
    first, second = result.to_json()["entries"][1:]
    assert first["tasks"] == second["tasks"] and first["recall"] == second["recall"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{engine}", "--quality", "{tasks}"], "--quality needs --checkpoint"),
        (
            ["{engine}", "{engine}/../engine", "--checkpoint", "{ck}"],
            "--quality shows several",
        ),
        (
            ["{engine}", "--checkpoint", "{ck}", "--forms", "fp8"],
            "--forms are beside engines",
        ),
        (["{engine}", "--checkpoint", "{ck}", "--quality", "{tasks}", "--modes", "whole"], "--modes is about steps"),
        (
            ["{engine}", "--checkpoint", "{ck}", "--quality", "{tasks}", "--numerics", "fp8"],
            "--numerics is about steps",
        ),
        (["{engine}", "--checkpoint", "{ck}", "--quality", "{ck}/config.json"], "config.json, line 1: "),
        (["{program}", "--checkpoint", "{ck}", "--quality", "{tasks}"], "manifest.json: cannot be read"),
        (["{engine}", "--checkpoint", "{engine}", "--quality", "{tasks}"], "config.json"),
    ],
)
def test_what_cannot_be_measured_is_one_line(nano: Path, args: list[str], words: str) -> None:
    places = {"engine": nano / "engine", "program": nano / "program", "ck": nano / "checkpoint"}
    line = [one.format(**places, tasks=nano / "tasks.jsonl") for one in args]
    result = invoke(*line, "--quiet")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.output
    assert words in result.stderr


def test_recall_is_looked_at_in_the_longest_rows_that_show_some() -> None:
    rows = [RunRow(ids=(1,) * length, max_tokens=0) for length in (32, 33, 400, 8000, 40)]
    assert _watched(rows, 32) == [1, 3, 4]  # 400 more would be too many beside 8,000
    assert _watched(rows, 8000) == _watched(rows, 0) == _watched(rows[:1], 32) == []
    assert len(_watched(rows[1:2] * 40, 32)) == 16


def test_another_models_checkpoint_is_refused_by_its_key(nano: Path, tiny_checkpoint: Path) -> None:
    line = [nano / "engine", "--checkpoint", tiny_checkpoint, "--quality", nano / "tasks.jsonl", "--quiet"]
    result = invoke(*line)
    assert result.exit_code == 2 and "the engine's model has" in result.stderr
