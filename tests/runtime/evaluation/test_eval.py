"""`seekforge eval` with lm-evaluation-harness itself (`tests/support/lm_eval_tasks.py` says where that may be)."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from tests.support.lm_eval_tasks import PYTHON, TASKS, logged, offline, skip_without_lm_eval, write_tasks

from seekforge.runtime.evaluation.answers import ANSWERS


def run(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "seekforge", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=offline(home / "hf"), cwd=home)


@pytest.mark.slow
def test_scores_are_those_of_transformers_with_the_harness_own_class(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    skip_without_lm_eval("transformers", "torch")
    tasks, out, other = tmp_path / "tasks", tmp_path / "out", tmp_path / "transformers.json"
    write_tasks(tasks, 12)
    done = run(tmp_path, tiny_engines["exact"], "--tasks", "words", "--include-path", tasks, "--output", out, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    script = [PYTHON, "-m", "tests.support.lm_eval_transformers", tiny_checkpoint, tmp_path, tasks, other, *TASKS]
    subprocess.run([*map(str, script)], check=True, capture_output=True, env=offline(tmp_path / "hf"))
    theirs = json.loads(other.read_text())
    assert set(results) == set(TASKS)
    for task, values in results.items():
        for key, value in values.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs["results"][task][key], rel=1e-4), (task, key)
        for sample, reference in zip(logged(out, task), theirs["samples"][task], strict=True):
            assert sample["doc_id"] == reference["doc_id"]
            for (response,), (wanted,) in zip(sample["resps"], reference["resps"], strict=True):
                if task == "words_generate":
                    assert response == wanted
                elif task == "words_rolling":
                    assert response == pytest.approx(wanted, abs=1e-3)
                else:
                    assert response == [pytest.approx(wanted[0], abs=1e-3), wanted[1]]


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_where_it_was(toy_engine: Path, tmp_path: Path) -> None:
    skip_without_lm_eval()
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    write_tasks(tasks, 400, {"words_next": TASKS["words_next"]})
    arguments = (toy_engine, "--tasks", "words_next", "--include-path", tasks, "--output", out)
    command = [PYTHON, "-m", "seekforge", "eval", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=offline(tmp_path / "hf"), cwd=tmp_path) as process:
        while not (out / ANSWERS).exists() or (out / ANSWERS).stat().st_size < 1000:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    before = len((out / ANSWERS).read_bytes().splitlines())
    assert 0 < before < 400 and not (out / "results.json").exists()
    done = run(tmp_path, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    whole = run(tmp_path, *arguments[:-1], tmp_path / "again", "--json")
    assert json.loads(done.stdout)["results"] == json.loads(whole.stdout)["results"]
    asked = [json.loads(line)["request"] for line in (out / ANSWERS).read_text().splitlines()]
    assert len(asked) == len(set(asked)) <= 400


@pytest.mark.slow
def test_python_downloads_and_metrics_of_task_files_are_refused_unasked(toy_engine: Path, tmp_path: Path) -> None:
    skip_without_lm_eval()
    tasks, ran = tmp_path / "tasks", tmp_path / "ran"
    choice, text = TASKS["words_choice"], TASKS["words_generate"]
    write_tasks(
        tasks,
        3,
        {
            "runs": f"{choice}process_docs: !function utils.docs\n",
            "remote": f"{choice}dataset_path: nobody/nothing\n",
            "metric": text.replace("exact_match", "rouge"),
            "reaches": text.replace('"{{question}}"', '"{{question.__class__.__mro__[1].__subclasses__()}}"'),
        },
    )
    (tasks / "utils.py").write_text(f"open({str(ran)!r}, 'w')\n\ndef docs(dataset):\n    return dataset\n")
    said = {
        "runs": "runs Python: utils.docs",
        "remote": "nobody/nothing",
        "metric": "rouge",
        "reaches": "SecurityError",
    }
    for name, words in said.items():
        done = run(tmp_path, toy_engine, "--tasks", name, "--include-path", tasks, "--quiet")
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert not ran.exists()
    done = run(tmp_path, toy_engine, "--tasks", "runs", "--include-path", tasks, "--trust-task-code", "--json")
    assert done.returncode == 0 and ran.exists(), done.stderr
    done = run(tmp_path, toy_engine, "--tasks", "words_chose", "--include-path", tasks, "--quiet")
    assert done.returncode == 2 and "no task 'words_chose'" in done.stderr
