"""Drive a model step by step in different ways, and judge two runs of the same tokens (spec §11.2).

Selection of keys and experts is discrete. Two correct runs may choose differently where the score gap at the
boundary is within numeric noise; such rows are counted, bounded, and judged with one side's choice injected
into the other. Never a loosened tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from seekforge.exporter.builder.onnxruntime.session import OrtSession
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.program.taps import SELECTIONS
from seekforge.exporter.tolerances import GATE
from seekforge.formats import parity_steps
from seekforge.formats.parity_steps import Mode, ParitySteps, make_case, ragged_lengths
from seekforge.formats.step_runner import run_steps

#: Contexts below, at, just above and far above the tiny model's index_topk of 64.
CONTEXTS = (10, 64, 65, 200, 700)
INDEX_TOPK = 64
#: The ways of cutting sequences that run the main model alone.
MODES = tuple(mode for mode in parity_steps.MODES if mode != "mtp")
#: At most this part of the rows may have chosen other keys or experts.
MAX_FLIPPED = 0.01


def tokens(length: int, seed: int = 1, vocab_size: int = 1024) -> list[int]:
    """Return random ids that leave out the special tokens at the start of the vocabulary."""
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


def lengths_of(mode: Mode, context: int) -> list[int]:
    """Return the lengths of the sequences that a mode runs: one, or three very different ones."""
    return list(ragged_lengths(context)) if mode == "ragged" else [context]


def chunks(mode: Mode, length: int) -> list[int]:
    """Cut a sequence as a mode does: as parity, but token by token from the start where that is quick."""
    if mode == "decode" and length <= 80:
        return [1] * length
    return parity_steps.chunks(mode, length, INDEX_TOPK)


def drive(session: TorchSession | OrtSession, sequences: Sequence[Sequence[int]], mode: Mode) -> list[Run]:
    """Run sequences together in the given mode over shuffled block tables.

    Args:
        session: what runs the steps.
        sequences: token ids; as many as `lengths_of` says.
        mode: one of MODES.

    Returns:
        One `Run` per sequence.
    """
    sizes = [chunks(mode, len(sequence)) for sequence in sequences]
    case = make_case(mode, mode, sequences, sizes, 1024, np.random.default_rng(0))
    names = ["logits", *(name for name in session.output_names() if name.startswith(SELECTIONS))]
    collected = [_Collect() for _ in sequences]
    for ran in run_steps(session, ParitySteps(cases=(case,)), lambda step: names):
        rows = np.cumsum([0] + [len(new) for new in ran.step.tokens])
        for row, sequence in enumerate(ran.step.sequences):
            collect, n = collected[sequence], len(ran.step.tokens[row])
            collect.logits.append(ran.tensors["logits"][rows[row] : rows[row + 1]])
            for name in names[1:]:
                per_row = ran.tensors[name].reshape(*ran.inputs.input_ids.shape, -1)
                collect.taps.setdefault(name, []).append(per_row[row, :n])
    return [collect.run() for collect in collected]


def relative_error(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the largest |difference| of each row of logits, in parts of the spread of `reference`."""
    return np.abs(logits - reference).max(-1) / reference.std()


def flipped_rows(run: Run, reference: Run) -> np.ndarray:
    """Return rows where any layer chose another set of keys or experts: [n] bool."""
    flipped = np.zeros(len(run.logits), bool)
    for name, chosen in run.taps.items():
        flipped |= (np.sort(chosen, -1) != np.sort(reference.taps[name], -1)).any(-1)
    return flipped


def readers_of(rows: np.ndarray, run: Run) -> np.ndarray:
    """Return `rows` and every row that reads one of them, directly or through others: [n] bool.

    Args:
        rows: [n] bool, by position.
        run: a run that has the keys that each row chose, in every layer.
    """
    keys = np.concatenate([value for name, value in run.taps.items() if name.startswith("topk_indices")], -1)
    reached = rows.copy()
    for row in range(int(rows.argmax()) + 1, len(rows)) if rows.any() else ():  # keys lie before their row
        chosen = keys[row]
        reached[row] |= reached[chosen[chosen >= 0]].any()
    return reached


def moved_rows(run: Run, reference: Run) -> np.ndarray:
    """Return rows that chose differently, and rows out of the gate: [n] bool."""
    return flipped_rows(run, reference) | (relative_error(run.logits, reference.logits) > GATE)


def assert_same(run: Run, reference: Run, what: str = "") -> None:
    """Two FP32 runs agree: few rows chose differently, and only rows that read those have other logits.

    Two scores that differ by less than the noise of f32 may change places, and whoever attends to such a row moves with
    it. A row that reads none of them, such as every row before the first, has no excuse; nor have more than a tenth.
    """
    error = relative_error(run.logits, reference.logits)
    flipped = flipped_rows(run, reference)
    assert np.isfinite(error).all(), f"{what}: logits are not finite"
    assert flipped.mean() <= MAX_FLIPPED, f"{what}: {flipped.sum()} of {len(flipped)} rows chose differently"
    out = (error > GATE) & ~flipped
    unexplained = out & ~readers_of(flipped, reference)
    assert not unexplained.any() and out.mean() <= 0.1, (
        f"{what}: {out.sum()} of {len(error)} rows differ by up to {error.max():.2e} of the spread, gate {GATE:g}; "
        f"{unexplained.sum()} of them read no row that chose differently"
    )
