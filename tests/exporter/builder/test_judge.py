"""`build --quality`: what was measured stands in the manifest, and an engine below a bound is not written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.random_nano import random_nano

from seekforge import ConfigError, EngineError, OptionError, TargetError, build
from seekforge.exporter.builder import judge
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.quality_run import RunAnswer
from seekforge.runtime.cli import main as cli


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random nano model; do not write into it."""
    return random_nano(tmp_path_factory)


def arguments(nano: Path, out: Path) -> dict[str, object]:
    return {
        "program": nano / "program",
        "out": out,
        "target": "cpu",
        "checkpoint": nano / "checkpoint",
        "quality": nano / "tasks.jsonl",
    }


def test_what_was_measured_stands_in_the_manifest_and_is_shown(nano: Path, tmp_path: Path) -> None:
    result = build(**arguments(nano, tmp_path / "engine"), min_quality={"english": 1e6, "sums": 0})  # pyright: ignore
    quality = load_manifest(tmp_path / "engine").quality
    assert quality is not None and quality == result.quality
    assert result.to_json()["quality"]["bounds"] == {"english": 1e6, "sums": 0}
    assert [one.task for one in quality.tasks] == ["sums", "english"]
    assert quality.tasks[0].score == 0 and 100 < quality.tasks[1].perplexity < 1e6  # type: ignore[operator]
    shown = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "engine")]).stdout
    assert "quality: sums 0.0% (at least 0.0%), english perplexity" in shown and "(at most 1e+06)" in shown
    as_json = json.loads(CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "engine"), "--json"]).stdout)
    assert as_json["quality"] == quality.model_dump(mode="json")


def test_an_engine_below_is_refused_by_task_score_and_bound_and_leaves_nothing(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = RunAnswer(completions=((5, 6), (), (5,)), nll_sums=(None, 170.0, None))
    monkeypatch.setattr(judge, "run_engine", lambda *_, **__: answer)
    with pytest.raises(EngineError) as caught:
        build(**arguments(nano, tmp_path / "engine"), min_quality=("sums=0.9", "english=2"))  # pyright: ignore
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'engine'}: not written: sums has score 0 in 2 rows, expected at least 0.9")
    assert "english has perplexity" in line and "expected at most 2" in line and "\n" not in line
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured_is_refused_before_anything_is_built(nano: Path, tmp_path: Path) -> None:
    wanted = arguments(nano, tmp_path / "engine")
    with pytest.raises(OptionError, match="names task 'recall'"):
        build(**wanted, min_quality="recall=0.5")  # pyright: ignore
    with pytest.raises(OptionError, match="--min-quality needs --quality"):
        build(**wanted | {"quality": None}, min_quality="sums=0.5")  # pyright: ignore
    with pytest.raises(TargetError, match="target rtx4090 is a GPU"):
        build(**wanted | {"target": "rtx4090"})  # pyright: ignore
    with pytest.raises(ConfigError, match="line 1: needs"):
        build(**wanted, max_model_len=4, dry_run=True)  # pyright: ignore
    assert list(tmp_path.iterdir()) == []
