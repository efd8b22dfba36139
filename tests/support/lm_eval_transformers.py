"""Score transformers' model on task files with lm_eval's own class for it, in a process that has both.

`python -m tests.support.lm_eval_transformers CHECKPOINT WORK TASKS_FOLDER OUT NAME…` writes what `lm_eval` logs of each
question, by task, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Read the command line, evaluate, write."""
    checkpoint, work, tasks, out = map(Path, sys.argv[1:5])
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tests.support.oracle import load_oracle, write_dequantized
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"),
        **{name: _text(config[name]) for name in ("bos_token", "eos_token")},
    )
    tokenizer.pad_token = tokenizer.eos_token
    model = HFLM(
        pretrained=load_oracle(write_dequantized(checkpoint, work / "dequantized")), tokenizer=tokenizer, batch_size=1
    )
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=sys.argv[5:],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=1000,
    )
    assert results is not None
    kept = {"results": results["results"], "samples": results["samples"]}
    out.write_text(json.dumps(kept, default=str))


def _text(token: str | dict[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


if __name__ == "__main__":
    main()
