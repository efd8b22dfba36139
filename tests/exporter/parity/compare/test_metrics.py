"""Distances of tensors, distributions and selections, at their edges."""

from __future__ import annotations

import numpy as np
import pytest

from seekforge.exporter.parity.compare.metrics import (
    Difference,
    Flip,
    classify,
    compare_logits,
    different,
    expert_gaps,
    farthest,
    key_gaps,
    row_errors,
)
from seekforge.exporter.parity.compare.selections import Choices
from seekforge.exporter.parity.locate.bisect import first_bad_layer


def accumulate(x: np.ndarray, y: np.ndarray, parts: int) -> Difference:
    result = Difference()
    for pair in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        result.add(*pair)
    return result


@pytest.mark.parametrize("parts", (1, 3))
def test_differences_add_up_over_steps(parts: int) -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((12, 7))
    x = y + 1e-3 * rng.standard_normal(y.shape)
    result = accumulate(x, y, parts)
    assert result.max_abs == pytest.approx(np.abs(x - y).max())
    assert result.rms_relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y))
    difference = 1 - (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert result.cosine_difference == pytest.approx(difference, rel=1e-4)
    assert result.calc_diff == pytest.approx(1 - 2 * (x * y).sum() / (x * x + y * y).sum(), rel=1e-4)


def test_differences_at_the_edges() -> None:
    nothing = accumulate(np.zeros((0, 3)), np.zeros((0, 3)), 1)
    zero = accumulate(np.zeros(5), np.zeros(5), 1)
    for result in (nothing, zero):
        assert (result.max_abs, result.max_relative, result.rms_relative) == (0, 0, 0)
        assert (result.calc_diff, result.cosine_difference, result.not_finite) == (0, 0, 0)
    broken = accumulate(np.array([1.0, np.nan, np.inf]), np.array([1.0, 2.0, np.inf]), 1)
    assert broken.not_finite == 1 and broken.max_abs == 0


def test_row_errors_are_parts_of_the_reference_and_nan_is_infinite() -> None:
    y = np.full((3, 4), 2.0)
    x = y.copy()
    x[1, 2] += 0.5
    x[2, 0] = np.nan
    assert row_errors(x, y).tolist() == [0, 0.25, np.inf]
    assert row_errors(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)


def test_logits_of_equal_and_other_distributions() -> None:
    y = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    x = y + np.array([[3.0], [0.0]])  # a constant changes no distribution
    x[1] = np.log([0.6, 0.2, 0.2])
    result = compare_logits(x, y, np.array([1, -1]))
    assert result.kl[0] == pytest.approx(0, abs=1e-12)
    assert result.kl[1] == pytest.approx(0.2 * np.log(0.2 / 0.6) + 0.6 * np.log(0.6 / 0.2))
    assert result.top1.tolist() == [True, False] and result.top10.tolist() == [1, 1]
    assert result.nll[0] == pytest.approx(-np.log(0.25)) and np.isnan(result.nll[1])
    assert np.isinf(compare_logits(np.full((1, 3), np.nan), y[:1], np.array([0])).error[0])


def test_sets_are_compared_without_order_and_fill() -> None:
    by_judged, by_reference = different(np.array([3, 1, -1, -1]), np.array([1, 2, 5, -1]))
    assert by_judged.tolist() == [3] and by_reference.tolist() == [2, 5]


def test_key_gaps_reach_over_the_boundary_from_both_sides() -> None:
    scores = np.array([0.0, 1.0, 0.9, 0.5, 0.5])
    reference = np.array([1, 2, 3])  # 4 scores like 3, which is taken: a tie
    assert key_gaps(scores, reference, np.array([4, 3])).tolist() == [0, 0]
    assert key_gaps(scores, reference, np.array([0])).tolist() == [0.5]  # 0.5 below the last, spread 1
    assert key_gaps(scores, reference, np.array([1])).tolist() == [0.5]  # 1.0 against the first left out, 0.5
    assert np.isinf(key_gaps(scores, reference, np.array([9]))).all()  # a key that is not visible


def test_expert_gaps_are_those_of_what_decides() -> None:
    # 4 groups of 2, 2 groups kept, 2 experts: groups score 1.7, 1.5, 1.4, 0.3
    biased = np.array([0.9, 0.8, 0.85, 0.65, 0.7, 0.7, 0.2, 0.1])
    reference = np.array([0, 2])
    gaps = expert_gaps(biased, reference, np.array([1, 4, 2]), n_group=4, topk_group=2)
    assert gaps[0] == pytest.approx(0.05)  # expert 1 is 0.05 below the last taken, in a kept group
    assert gaps[1] == pytest.approx(0.1)  # expert 4 lost with its group, 1.4 against 1.5
    assert gaps[2] == pytest.approx(0.05)  # expert 2 was taken 0.05 above expert 1


def test_who_takes_the_place_of_a_dropped_group_is_judged_by_the_group() -> None:
    # 3 groups of 2, 2 kept: groups score 1.9, 1.31, 1.3; the other side drops group 1 and takes 2
    biased = np.array([1.0, 0.9, 1.3, 0.01, 0.7, 0.6])
    gaps = expert_gaps(biased, np.array([2, 0, 1]), np.array([2, 4]), n_group=3, topk_group=2)
    assert gaps == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize(("gap", "kind"), [(0.0, "tie"), (1e-6, "noise"), (1e-5, "noise"), (1.1e-5, "wrong")])
def test_gaps_have_names(gap: float, kind: str) -> None:
    assert classify(gap, 1e-5) == kind
    assert classify(float("inf"), 1e-5) == classify(float("nan"), 1e-5) == "wrong"


def test_gaps_are_named_by_the_noise_of_all_steps_and_the_farthest_are_kept() -> None:
    """Many that are noise come first, and the noise is known only at the end."""
    choices = Choices(tolerance=1e-5)
    for row in range(500):
        choices.note(0, 0, row, np.array([1, 2]), 1, np.array([0.0, 3e-5]))
    choices.note(1, 0, 7, np.array([9]), 0, np.array([0.2]))
    choices.tolerance = 4e-5  # of a later step
    choices.settle()
    assert choices.kinds == {"tie": 500, "noise": 500, "wrong": 1, "unknown": 0}
    assert choices.flips[0] == Flip(1, 0, 7, 9, "reference", 0.2, "wrong") and len(choices.flips) == 100
    assert {flip.kind for flip in choices.flips[1:]} == {"noise"}
    odd = [Flip(0, 0, 0, i, "judged", gap, "wrong") for i, gap in enumerate((1.0, float("nan"), float("inf")))]
    assert [flip.chosen for flip in farthest(odd, 2)] == [1, 2]


@pytest.mark.parametrize("number", (1, 2, 3, 8, 61))
def test_bisection_finds_every_layer_in_few_runs(number: int) -> None:
    for wrong in range(number):
        runs: list[tuple[int, int]] = []

        def bad(start: int, stop: int, wrong: int = wrong, runs: list[tuple[int, int]] = runs) -> bool:
            runs.append((start, stop))
            return start <= wrong < stop

        assert first_bad_layer((0, number), bad) == wrong
        assert len(runs) <= 1 + int(np.ceil(np.log2(number)))
    assert first_bad_layer((0, number), lambda start, stop: False) is None


def test_bisection_names_the_first_of_two() -> None:
    assert first_bad_layer((3, 20), lambda start, stop: any(start <= layer < stop for layer in (6, 15))) == 6
