"""Gates of whole runs on few rows: luck alone must not fail an engine, and a fault must not hide behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.parity.compare.dumps import CaseComparison, Comparison, draw_folder, more_draws
from seekforge.exporter.parity.compare.metrics import Difference
from seekforge.exporter.parity.gates import judge
from seekforge.exporter.parity.torch_walks import NOISE, Walker
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.dump import Dump
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parity_steps import make_plan


def compared(error: np.ndarray, noise: np.ndarray, *, other: int = 0, noise_other: int = 0) -> Comparison:
    """Rows with these errors of logits; `other` of them have another likeliest token."""
    rows = len(error)
    zero = np.zeros(rows)
    top1, noise_top1 = np.ones(rows), np.ones(len(noise))
    top1[:other], noise_top1[:noise_other] = 0, 0
    case = CaseComparison(
        name="whole",
        mode="whole",
        context=rows,
        graph="model",
        rows=[(0, i) for i in range(rows)],
        heat_layers=[],
        heat=np.zeros((0, rows)),
        logits=Difference(),
        logit_rows=np.arange(rows),
        error=error,
        kl=zero,
        top1=top1,
        top10=top1,
        nll=zero,
        nll_reference=zero,
        noise_error=noise[:rows],
        drawn_error=noise,
        drawn_kl=np.zeros(len(noise)),
        drawn_top1=noise_top1,
        flipped=np.zeros(rows, bool),
    )
    return Comparison([], [case], 0, has_noise=True)


def passed(comparison: Comparison) -> dict[str, bool]:
    return {gate.name: gate.passed for gate in judge(comparison, [], same_numerics=True, exact=False)}


def test_one_row_that_a_flip_moved_farther_does_not_fail_few_rows() -> None:
    """Measured on a right engine of real width: a flip at the third of 24 tokens, where few keys share its weight."""
    noise = np.full(96, 0.035)
    error = np.full(24, 0.033)
    error[2] = 0.064
    assert passed(compared(error, noise))["logits"]
    error[2] = 0.5
    assert not passed(compared(error, noise))["logits"], "no flip does that"
    many = np.full(2000, 0.033)
    many[:40] = 0.064
    assert not passed(compared(many, np.full(2000, 0.035)))["logits"], "2 % of the rows are no luck"


@pytest.mark.parametrize(("followed", "most"), [(False, 20), (True, 0)])
def test_choices_that_were_followed_excuse_no_row(followed: bool, most: int) -> None:
    """Where PyTorch goes on with the engine's choices, no row moves: neither by a choice nor by reading such a row."""
    rows = 2000
    for out in (most, most + 1):
        error = np.full(rows, 1e-6)
        error[:out] = 1e-2
        comparison = compared(error, np.zeros(0))
        comparison.cases[0].flipped[-1] = True
        gates = {gate.name: gate for gate in judge(comparison, [], same_numerics=True, exact=True, followed=followed)}
        assert gates["logits"].passed is (out == most)
    error = np.full(rows, 1e-6)
    error[-1] = 1e-2
    comparison = compared(error, np.zeros(0))
    comparison.cases[0].flipped[-1] = True
    gates = {gate.name: gate for gate in judge(comparison, [], same_numerics=True, exact=True, followed=followed)}
    assert gates["logits"].passed is not followed


@pytest.mark.parametrize(
    ("rows", "other", "noise_other", "right"),
    [(24, 2, 0, True), (24, 12, 0, False), (1000, 8, 0, True), (1000, 60, 10, False), (1000, 30, 25, True)],
)
def test_rare_tokens_that_differ_are_counted_with_their_luck(
    rows: int, other: int, noise_other: int, right: bool
) -> None:
    even = np.full(rows, 0.03)
    assert passed(compared(even, even, other=other, noise_other=noise_other))["top-1"] is right


def test_noise_is_drawn_again_where_rows_are_few(
    tiny_config: ModelConfig, tiny_source: Checkpoint, tmp_path: Path
) -> None:
    walker = Walker(Settings(tiny_config, NUMERICS["fp8"], "f32"), tiny_source, "test", lambda text: None)

    def walk(context: int) -> tuple[Dump, list[Dump]]:
        sizes = {"vocab_size": tiny_config.vocab_size, "index_topk": tiny_config.index_topk}
        plan = make_plan(contexts=(context,), has_mtp=False, modes=("whole",), **sizes)
        work = tmp_path / str(context)
        work.mkdir()
        walker.run(plan, work)
        first = Dump.open(work / NOISE)
        assert more_draws(first) == [], "only where it is needed"
        assert walker.draw_noise(plan, work) is (context < 96)
        return first, more_draws(first)

    first, more = walk(30)
    assert [dump.folder for dump in more] == [draw_folder(first.folder, draw) for draw in (1, 2)]
    drawn = [dump.tensor(0, "logits") for dump in (first, *more)]
    assert all((one != other).any() for i, one in enumerate(drawn) for other in drawn[:i]), "each is another"
    assert not any(name.startswith("residual") for name in more[0].names(0)), "logits alone are kept"
    assert walk(100)[1] == []
