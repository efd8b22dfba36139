"""lm-evaluation-harness scores through the server what PyTorch scores.

It is no dependency of ours, and large: `pip install 'lm-eval[api]'`, perhaps elsewhere, and name its Python in
SEEKFORGE_LM_EVAL_PYTHON.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.support.served import served

from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import NUMERICS
from seekforge.runtime.text.tokenizer import Tokenizer

PYTHON = os.environ.get("SEEKFORGE_LM_EVAL_PYTHON", sys.executable)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "red", "but", "they", "had", "what", "who", "more"]
TASK = """
task: local_mc
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path, count: int) -> list[dict]:
    """Write a task of multiple choice; returns its questions."""
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, most)))

    docs = [
        {"question": words(20), "choices": [f" {words(4)}" for _ in range(4)], "gold": rng.randrange(4)}
        for _ in range(count)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "local_mc.yaml").write_text(TASK.format(data=data))
    return docs


@pytest.mark.slow
def test_scores_are_those_of_pytorch(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tiny_source: Checkpoint, tmp_path: Path
) -> None:
    if subprocess.run([PYTHON, "-c", "import lm_eval"], capture_output=True, check=False).returncode:
        pytest.skip("lm-eval is not installed (SEEKFORGE_LM_EVAL_PYTHON names a Python that has it)")
    docs = write_task(tmp_path, 12)
    with served(tiny_engines["exact"], "0", "--served-model-name", "tiny") as (_, url, _):
        arguments = (
            f"model=tiny,base_url={url}/v1/completions,tokenizer={tiny_checkpoint},tokenized_requests=False,"
            "num_concurrent=4"
        )
        command = [PYTHON, "-m", "lm_eval", "--model", "local-completions", "--tasks", "local_mc"]
        command += ["--include_path", str(tmp_path), "--model_args", arguments]
        command += ["--log_samples", "--output_path", str(tmp_path / "out")]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_local_mc_*.jsonl")
    scored = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    tokenizer = Tokenizer(tiny_checkpoint / "tokenizer.json")
    settings = Settings(ModelConfig.load(tiny_checkpoint), NUMERICS["exact"])
    right = 0
    for doc, sample in zip(docs, scored, strict=True):
        sums = []
        for choice, (response,) in zip(doc["choices"], sample["resps"], strict=True):
            before, ids = tokenizer.encode(doc["question"]), tokenizer.encode(doc["question"] + choice)
            logits = TorchSession(settings, tiny_source).prefill(ids)["logits"]
            rows = torch.log_softmax(logits[:-1].double(), dim=-1).gather(1, torch.tensor(ids[1:])[:, None]).flatten()
            sums.append(float(rows[len(before) - 1 :].sum()))
            assert float(response[0]) == pytest.approx(sums[-1], abs=1e-3)
        right += sums.index(max(sums)) == doc["gold"]
    assert sum(sample["acc"] for sample in scored) == right
