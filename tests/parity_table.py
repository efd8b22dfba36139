"""Print how far an engine is from PyTorch, and PyTorch from `transformers`: `parity_table.py CHECKPOINT ENGINE`.

ENGINE must have `exact` numerics: FP32 without any quantisation, so that two correct implementations differ by rounding
noise only. (With `fp8` a last-bit difference can flip an FP8 rounding, which then flips a choice: see the tests.)
Exits with 1 if a row is out of the gate that the test suite uses. Without transformers its lines are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from seekforge.exporter.build.ort_session import OrtSession
from seekforge.exporter.model.session import TorchSession, make_step
from seekforge.exporter.model.step import Settings
from seekforge.plugins.formats.manifest import load_manifest
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.numerics import EXACT
from seekforge.plugins.formats.program import BLOCK_SIZE
from seekforge.plugins.formats.safetensors import Checkpoint

CONTEXTS = (10, 64, 65, 200)
#: Largest allowed difference in parts of the logits' spread, and the part of rows that may choose otherwise.
GATE, MAX_OTHER_CHOICES = 1e-4, 0.01


@dataclass(frozen=True)
class Result:
    """One prefill of n tokens.

    Attributes:
        logits: [n, vocab_size].
        keys: per layer [n, k], sorted.
        experts: per MoE layer [n, k], sorted.
    """

    logits: np.ndarray
    keys: list[np.ndarray]
    experts: list[np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """Two results of the same prompt, in numbers."""

    largest: float
    median: float
    top1: float
    other_keys: int
    other_experts: int
    passed: bool


def compare(ours: Result, theirs: Result) -> Comparison:
    """Judge `ours` by `theirs`: rows with the same choices must have the same logits, and few may choose otherwise."""
    error = np.abs(ours.logits - theirs.logits).max(-1) / theirs.logits.std()
    keys, experts = _other(ours.keys, theirs.keys), _other(ours.experts, theirs.experts)
    other = keys | experts
    return Comparison(
        largest=float(error.max()),
        median=float(np.median(error)),
        top1=float((ours.logits.argmax(-1) == theirs.logits.argmax(-1)).mean()),
        other_keys=int(keys.sum()),
        other_experts=int(experts.sum()),
        passed=bool((error[~other] <= GATE).all() and other.mean() <= MAX_OTHER_CHOICES),
    )


def _other(ours: list[np.ndarray], theirs: list[np.ndarray]) -> np.ndarray:
    """Rows where any layer chose another set."""
    return np.any([(mine != yours).any(-1) for mine, yours in zip(ours, theirs, strict=True)], axis=0)


def from_outputs(outputs: dict[str, Any]) -> Result:
    """Collect what a step of `TorchSession` or `OrtSession` with one sequence returned."""
    arrays = {name: np.asarray(value) for name, value in outputs.items()}

    def taps(kind: str) -> list[np.ndarray]:
        return [np.sort(a.reshape(-1, a.shape[-1]), -1) for name, a in arrays.items() if name.startswith(kind)]

    return Result(arrays["logits"], taps("topk_indices."), taps("expert_ids."))


def from_oracle(oracle: Any, ids: list[int], width: int) -> Result:
    """Run `transformers` on one prompt and note what it chose.

    Args:
        oracle: of `oracle.load_oracle`.
        ids: the prompt.
        width: index_topk; transformers lists fewer keys for shorter prompts, and keys that are not yet visible.
    """
    from oracle import record_selection

    experts: list[np.ndarray] = []
    with ExitStack() as stack:
        chosen = stack.enter_context(record_selection(oracle))
        for layer in oracle.model.layers:
            if hasattr(layer.mlp, "gate"):
                hook = layer.mlp.gate.register_forward_hook(lambda module, args, out: experts.append(out[2].numpy()))
                stack.callback(hook.remove)
        with torch.inference_mode():
            logits = oracle(torch.tensor([ids])).logits[0].numpy()
    keys = []
    for indices in chosen:
        rows = indices[0].numpy()
        visible = np.where(rows <= np.arange(len(ids))[:, None], rows, -1)
        padding = np.full((len(ids), width - visible.shape[1]), -1)
        keys.append(np.sort(np.concatenate([visible, padding], 1), -1))
    return Result(logits, keys, [np.sort(ids, -1) for ids in experts])


def main() -> int:
    """Compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engine", type=Path)
    arguments = parser.parse_args()
    manifest = load_manifest(arguments.engine)
    if manifest.numerics["name"] != EXACT.name:
        parser.error(f"{arguments.engine}: numerics {manifest.numerics['name']}, expected {EXACT.name}")
    config = ModelConfig.load(arguments.checkpoint)
    title = f"numerics {EXACT.name}: difference of logits in parts of their spread, all rows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("compared", no_wrap=True)
    for name in ("tokens", "max", "median", "same\ntop-1", "other\nkeys", "other\nexperts", ""):
        table.add_column(name, justify="right", no_wrap=True)
    passed = True

    def add(what: str, length: int, found: Comparison) -> None:
        nonlocal passed
        passed &= found.passed
        table.add_row(
            what,
            str(length),
            f"{found.largest:.1e}",
            f"{found.median:.1e}",
            f"{found.top1:.0%}",
            str(found.other_keys),
            str(found.other_experts),
            "[green]ok[/]" if found.passed else "[red]OUT[/]",
            end_section=length == CONTEXTS[-1],
        )

    # no special tokens: they sit at the start of the vocabulary
    prompt = np.random.default_rng(1).integers(16, config.vocab_size * 7 // 8, max(CONTEXTS)).tolist()
    num_blocks = -(-max(CONTEXTS) // BLOCK_SIZE) + 1
    reference: dict[int, Result] = {}
    with Checkpoint.open(arguments.checkpoint) as source, torch.inference_mode():
        for length in CONTEXTS:
            session = TorchSession(Settings(config, EXACT, "f32"), source, num_blocks)
            step = make_step([prompt[:length]], [0], [list(range(1, num_blocks))])
            reference[length] = from_outputs(session.step(step))
    if importlib.util.find_spec("transformers") is not None:
        from oracle import load_oracle, write_dequantised

        with tempfile.TemporaryDirectory() as folder:
            oracle = load_oracle(write_dequantised(arguments.checkpoint, Path(folder) / "f32"))
            for length in CONTEXTS:
                theirs = from_oracle(oracle, prompt[:length], config.index_topk)
                add("PyTorch : transformers", length, compare(reference[length], theirs))
    for length in CONTEXTS:
        engine = OrtSession(arguments.engine, manifest.graphs["model"], num_blocks * BLOCK_SIZE)
        step = make_step([prompt[:length]], [0], [list(range(1, num_blocks))])
        add("engine : PyTorch", length, compare(from_outputs(engine.step(step)), reference[length]))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"[dim]spread: standard deviation of the logits. other: rows where a layer chose another set of keys (of "
        f"{config.index_topk}) or experts. ok: difference ≤ {GATE:g}, other ≤ {MAX_OTHER_CHOICES:.0%}.[/]"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
