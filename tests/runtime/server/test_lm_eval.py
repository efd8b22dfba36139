"""lm-evaluation-harness scores through the server what PyTorch scores.

For this it needs its own extra: `pip install 'lm-eval[api]'`, perhaps elsewhere, and name its Python in
SEEKFORGE_LM_EVAL_PYTHON.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tests.support.lm_eval_tasks import PYTHON, TASKS, offline, skip_without_lm_eval, write_tasks
from tests.support.served import served

from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import NUMERICS
from seekforge.runtime.text.tokenizer import Tokenizer


@pytest.mark.slow
def test_scores_are_those_of_pytorch(
    tiny_engines: dict[str, Path], tiny_checkpoint: Path, tiny_source: Checkpoint, tmp_path: Path
) -> None:
    skip_without_lm_eval("tenacity")  # of its extra `api`
    docs = write_tasks(tmp_path, 12, {"words_choice": TASKS["words_choice"]})
    with served(tiny_engines["exact"], "0", "--served-model-name", "tiny") as (_, url, _):
        arguments = (
            f"model=tiny,base_url={url}/v1/completions,tokenizer={tiny_checkpoint},tokenized_requests=False,"
            "num_concurrent=4"
        )
        command = [PYTHON, "-m", "lm_eval", "--model", "local-completions", "--tasks", "words_choice"]
        command += ["--include_path", str(tmp_path), "--model_args", arguments]
        command += ["--log_samples", "--output_path", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_words_choice_*.jsonl")
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
