"""Local tasks of lm-evaluation-harness, and the Python that has the harness."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: lm-evaluation-harness is large, and may be installed elsewhere than what runs the tests: the extra `eval` there.
PYTHON = os.environ.get("SEEKFORGE_LM_EVAL_PYTHON", sys.executable)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "red", "but", "they", "had", "what", "who", "more"]
#: Name of a task -> its file.
TASKS = {
    "words_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "words_next": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{next}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "words_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "words_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


def skip_without_lm_eval(*modules: str) -> None:
    """Skip a test where the harness, or a module that the same Python needs, is missing."""
    for module in ("lm_eval", *modules):
        if subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, check=False).returncode:
            pytest.skip(f"{module} is not installed (SEEKFORGE_LM_EVAL_PYTHON names a Python that has it)")


def write_tasks(folder: Path, count: int, tasks: dict[str, str] = TASKS) -> list[dict[str, Any]]:
    """Write task files, all with the tag `words`, and their data; returns the questions."""
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, most)))

    docs = [
        {
            "question": words(20),
            "choices": [f" {words(4)}" for _ in range(4)],
            "gold": rng.randrange(4),
            "text": words(60),
            "next": f" {words(4)}",
        }
        for _ in range(count)
    ]
    folder.mkdir(exist_ok=True)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "common.yml").write_text(
        f"tag: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    )
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"include: common.yml\ntask: {name}\n{text}")
    return docs


def offline(home: Path) -> dict[str, str]:
    """Return the environment of a process that finds this code, downloads nothing, and keeps its caches in `home`."""
    more = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}
    return os.environ | more | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def logged(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return what `seekforge eval` logged of each question of a task, in their order."""
    lines = (folder / f"samples_{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda one: one["doc_id"])
