from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seekforge.common.errors import RequestError
from seekforge.runtime.evaluation.task_files import members, metrics, needs_download, read_task_file, tasks_inside


def test_functions_are_found_wherever_they_stand_and_none_is_run(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("raise SystemExit('this was run')")
    (tmp_path / "base.yml").write_text("include: further.yml\nprocess_docs: !function utils.docs\n")
    (tmp_path / "further.yml").write_text("a: [{b: [!function utils.deep]}]\ninclude: base.yml\n")  # a circle
    task = tmp_path / "task.yaml"
    task.write_text("task: one\ninclude: [base.yml]\n? !function utils.key\n: 1\n")
    assert sorted(read_task_file(task).functions) == ["utils.deep", "utils.docs", "utils.key"]
    task.write_text("task: '!function utils.text'\n# !function utils.comment\n")
    assert read_task_file(task).functions == ()


@pytest.mark.parametrize("text", ["a: [", "a: &x [*x]\nb: \x00", "[" * 3000, "a: 1\n" * 100_000], ids=len)
def test_what_is_no_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(RequestError, match=r"task\.yaml: .*a task is a YAML file"):
        read_task_file(tmp_path / "task.yaml")


def test_an_include_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("include: nowhere.yml")
    with pytest.raises(RequestError, match=r"nowhere\.yml"):
        read_task_file(tmp_path / "task.yaml")


def test_data_that_would_be_downloaded_is_told_from_files(tmp_path: Path) -> None:
    assert needs_download({"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "a.jsonl"}}}) is None
    assert needs_download({"dataset_path": str(tmp_path)}) is None
    assert needs_download({}) is None
    assert needs_download({"dataset_path": "cais/mmlu"}) == "cais/mmlu"
    remote: dict[str, Any] = {"dataset_path": "json", "dataset_kwargs": {"data_files": ["hf://datasets/a/b.jsonl"]}}
    assert needs_download(remote) == "hf://datasets/a/b.jsonl"


def test_groups_name_tasks_or_hold_them() -> None:
    group = {"group": "g", "task": ["a", {"task": "b", "dataset_path": "x/y"}, {"group": "h", "task": ["c"]}]}
    assert sorted(members(group)) == ["a", "b", "c"]
    assert "x/y" in [needs_download(one) for one in tasks_inside(group)]
    assert list(members({"task": "single"})) == []


def test_metrics_of_another_library_are_told() -> None:
    config = {"metric_list": [{"metric": "acc"}, {"metric": "rouge", "hf_evaluate": True}, {"aggregation": "mean"}]}
    assert list(metrics(config)) == [("acc", False), ("rouge", True)]
