"""Drive a model step by step in different ways, and judge two runs of the same tokens (spec §11.2).

Selection of keys and experts is discrete. Two correct runs may choose differently where the score gap at the
boundary is within numeric noise; such rows are counted, bounded, and judged with one side's choice injected
into the other. Never a loosened tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seekforge.exporter.models.deepseek_v32.session import shuffled_tables
from seekforge.formats.step_io import StepInputs, lay_out

#: Contexts below, at, just above and far above the tiny model's index_topk of 64.
CONTEXTS = (10, 64, 65, 200, 700)
MODES = ("whole", "chunked", "decode", "ragged")
#: Largest difference of FP32 logits in parts of their spread. Measured: 5e-6 against transformers, 4e-6 between
#: ONNX Runtime and torch, over all contexts and modes here; twenty times that is still far below any mistake.
GATE = 1e-4
#: At most this part of the rows may have chosen other keys or experts.
MAX_FLIPPED = 0.01

Step = Callable[[StepInputs], Mapping[str, Any]]


def tokens(length: int, seed: int = 1, vocab_size: int = 1024) -> list[int]:
    """Random ids that leave out the special tokens at the start of the vocabulary."""
    return np.random.default_rng(seed).integers(16, vocab_size - 100, length).tolist()


@dataclass
class Run:
    """What one sequence gave: logits [n, V], and per tap name [n, k], by position."""

    logits: np.ndarray
    taps: dict[str, np.ndarray]


@dataclass
class _Collect:
    logits: list[np.ndarray] = field(default_factory=list)
    taps: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def run(self) -> Run:
        return Run(np.concatenate(self.logits), {name: np.concatenate(rows) for name, rows in self.taps.items()})


def lengths_of(mode: str, context: int) -> list[int]:
    """Lengths of the sequences that a mode runs: one, or three very different ones."""
    return [context, context // 3 + 1, min(5, context)] if mode == "ragged" else [context]


def chunks(mode: str, length: int) -> list[int]:
    """How a mode cuts one sequence into steps."""
    if mode == "whole":
        return [length]
    if mode == "chunked":
        # a border at index_topk, and others that are no multiple of a block
        sizes = [64, 37, 100] + [131] * (length // 131)
    elif mode == "decode":
        # token by token from the start where that is quick, else the last tokens
        prefill = 0 if length <= 80 else length - 12
        sizes = ([prefill] if prefill else []) + [1] * length
    else:
        sizes = [max(1, length - 4)] + [1] * 4
    result: list[int] = []
    for size in sizes:
        left = length - sum(result)
        if left:
            result.append(min(size, left))
    return result


def drive(step: Step, sequences: list[list[int]], mode: str) -> list[Run]:
    """Run sequences together in the given mode over shuffled block tables.

    Args:
        step: takes inputs, returns logits [N, V] and taps by name, arrays or tensors.
        sequences: token ids; as many as `lengths_of` says.
        mode: one of MODES.

    Returns:
        One `Run` per sequence.
    """
    tables, _ = shuffled_tables([len(sequence) for sequence in sequences])
    plans = [chunks(mode, len(sequence)) for sequence in sequences]
    done = [0] * len(sequences)
    collected = [_Collect() for _ in sequences]
    for turn in range(max(len(plan) for plan in plans)):
        active = [i for i, plan in enumerate(plans) if turn < len(plan)]
        new = [sequences[i][done[i] : done[i] + plans[i][turn]] for i in active]
        inputs = lay_out(new, [done[i] for i in active], [tables[i] for i in active])
        outputs = {name: np.asarray(value) for name, value in step(inputs).items()}
        rows = np.cumsum([0] + [len(part) for part in new])
        width = inputs.input_ids.shape[1]
        for row, i in enumerate(active):
            n = len(new[row])
            collected[i].logits.append(outputs["logits"][rows[row] : rows[row + 1]])
            for name, value in outputs.items():
                if name.startswith(("topk_indices", "expert_ids")):
                    per_row = value.reshape(len(active), width, -1)
                    collected[i].taps.setdefault(name, []).append(per_row[row, :n])
            done[i] += n
    return [collect.run() for collect in collected]


def num_blocks(sequences: Iterable[list[int]]) -> int:
    """Blocks that `drive` needs for these sequences, scrap and spare included."""
    return shuffled_tables([len(sequence) for sequence in sequences])[1]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Largest |difference| of each row of logits, in parts of the spread of `theirs`."""
    return np.abs(ours - theirs).max(-1) / theirs.std()


def flipped_rows(ours: Run, theirs: Run) -> np.ndarray:
    """Rows where any layer chose another set of keys or experts: [n] bool."""
    flipped = np.zeros(len(ours.logits), bool)
    for name, mine in ours.taps.items():
        flipped |= (np.sort(mine, -1) != np.sort(theirs.taps[name], -1)).any(-1)
    return flipped


def readers_of(rows: np.ndarray, run: Run) -> np.ndarray:
    """Return `rows` and every row that reads one of them, directly or through others: [n] bool.

    Args:
        rows: [n] bool, by position.
        run: with the keys that each row chose, in every layer.
    """
    keys = np.concatenate([value for name, value in run.taps.items() if name.startswith("topk_indices")], -1)
    reached = rows.copy()
    for row in range(int(rows.argmax()) + 1, len(rows)) if rows.any() else ():  # keys lie before their row
        chosen = keys[row]
        reached[row] |= reached[chosen[chosen >= 0]].any()
    return reached


def moved_rows(ours: Run, theirs: Run) -> np.ndarray:
    """Rows that chose differently, and rows out of the gate: [n] bool."""
    return flipped_rows(ours, theirs) | (relative_error(ours.logits, theirs.logits) > GATE)


def assert_same(ours: Run, theirs: Run, what: str = "") -> None:
    """Two FP32 runs agree: few rows chose differently, and only rows that read those have other logits.

    Two scores that differ by less than the noise of f32 may change places, and whoever attends to such a row moves with
    it. A row that reads none of them, such as every row before the first, has no excuse; nor have more than a tenth.
    """
    error = relative_error(ours.logits, theirs.logits)
    flipped = flipped_rows(ours, theirs)
    assert np.isfinite(error).all(), f"{what}: logits are not finite"
    assert flipped.mean() <= MAX_FLIPPED, f"{what}: {flipped.sum()} of {len(flipped)} rows chose differently"
    out = (error > GATE) & ~flipped
    unexplained = out & ~readers_of(flipped, theirs)
    assert not unexplained.any() and out.mean() <= 0.1, (
        f"{what}: {out.sum()} of {len(error)} rows differ by up to {error.max():.2e} of the spread, gate {GATE:g}; "
        f"{unexplained.sum()} of them read no row that chose differently"
    )
