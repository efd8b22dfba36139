"""The engine and PyTorch on the same tokens: how far apart are the log-probabilities that each gives a text?

`seekforge parity` looks at everything, with gates; this is the shortest form of the question. Ask it of an engine of
exact numerics, where only the order of sums differs. Needs the extra `export`, and a checkpoint that fits in memory.

    python examples/compare_with_pytorch.py ENGINE CHECKPOINT
"""

import sys
from pathlib import Path

import torch

from seekforge import LLM, SamplingParams
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import numerics_from_dict

TOKENS = [(7 * position * position + 11) % 500 for position in range(100)]


def main(engine: str, checkpoint: str) -> None:
    with LLM(engine) as llm:
        (output,) = llm.generate([TOKENS], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
        numerics = numerics_from_dict(llm.engine.manifest.numerics)
    assert output.prompt_logprobs is not None
    from_engine = [entry.logprob for entry in output.prompt_logprobs if entry is not None]  # none for the first token

    settings = Settings(ModelConfig.load(Path(checkpoint)), numerics)
    with Checkpoint.open(Path(checkpoint)) as source:
        logits = TorchSession(settings, source).prefill(TOKENS)["logits"]
    rows = torch.log_softmax(logits[:-1].double(), dim=-1)
    from_torch = rows.gather(1, torch.tensor(TOKENS[1:])[:, None]).flatten().tolist()

    print("token  engine      PyTorch")
    for token, ours, theirs in list(zip(TOKENS[1:], from_engine, from_torch, strict=True))[:5]:
        print(f"{token:5}  {ours:10.6f}  {theirs:10.6f}")
    largest = max(abs(ours - theirs) for ours, theirs in zip(from_engine, from_torch, strict=True))
    print(f"largest difference of {len(from_engine)} log-probabilities: {largest:.2e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
