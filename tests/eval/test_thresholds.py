"""Thresholds compared with Recall's and with exact sums, and their guarantees on unseen items."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from math import comb

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tests.eval.running import draws
from tests.references import STORED, needs
from tilelli_jax.eval.thresholds import (
    GRID,
    Thresholds,
    conformal_min_items,
    conformal_threshold,
    guaranteed_thresholds,
    precision_thresholds,
    verdict,
)

CASES = STORED / "recall_cases" / "metric_cases.npz"
Chance = Callable[[np.ndarray], np.ndarray]  # score → probability of a 1
ITEMS = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=40)


def to_arrays(items: list[tuple[bool, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([int(label) for label, _ in items]), np.array([score / 8 for _, score in items])


@needs(CASES)
def test_the_rank_rule_equals_recalls() -> None:
    with np.load(CASES, allow_pickle=False) as cases:
        numbers = sorted({name.partition("/")[0] for name in cases})
        assert len(numbers) == 4
        for k in numbers:
            thresholds = precision_thresholds(cases[f"{k}/y"], cases[f"{k}/p"], 0.85)
            assert thresholds == (cases[f"{k}/green"], cases[f"{k}/red"])


@given(ITEMS, st.sampled_from((0.5, 0.75, 0.85)))
def test_the_rank_rule_rank_by_rank(items: list[tuple[bool, int]], target: float) -> None:
    def last_score(ranked: list[tuple[bool, int]], correct: bool) -> float | None:
        score = None
        for k in range(1, len(ranked) + 1):
            if sum(label == correct for label, _ in ranked[:k]) >= target * k:
                score = ranked[k - 1][1] / 8
        return score
    descending = sorted(items, key=lambda item: -item[1])
    ascending = sorted(items, key=lambda item: item[1])
    assert precision_thresholds(*to_arrays(items), target) == (
        last_score(descending, True), last_score(ascending, False))


def test_verdicts() -> None:
    verdicts = [verdict(score, 0.8, 0.3) for score in (0.9, 0.8, 0.79, 0.3, 0.29)]
    assert verdicts == ["likely knows"] * 2 + ["uncertain"] * 2 + ["likely beyond its knowledge"]
    assert [verdict(score, 0.4, 0.7) for score in (0.8, 0.5, 0.4, 0.39)] == [
        "likely knows", "likely knows", "likely knows", "likely beyond its knowledge"]
    assert [verdict(score, None, None) for score in (0.0, 1.0)] == ["uncertain", "uncertain"]
    assert verdict(0.1, None, 0.2) == "likely beyond its knowledge"
    assert verdict(1, 0.9, None) == "likely knows"
    with pytest.raises(ValueError, match="score"):
        verdict(float("nan"), 0.8, 0.3)


# --- Guarantees ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 36, 37, 45, 100])
@pytest.mark.parametrize("thresholds", [1, 19])
def test_the_number_of_correct_items_that_a_guarantee_requires(n: int, thresholds: int) -> None:
    """Compared with the exact binomial tail in fractions; no item lies beyond the grid's other thresholds."""
    grid = [0.5, *np.linspace(2, 3, thresholds - 1)]
    def tail(k: int) -> Fraction:
        t = Fraction(17, 20)
        return sum((comb(n, i) * t**i * (1 - t) ** (n - i) for i in range(k, n + 1)), Fraction(0))
    for k in range(n + 1):
        labels, scores = np.arange(n) < k, np.full(n, 0.75)
        significant = tail(k) <= Fraction(1, 20) / thresholds
        above = guaranteed_thresholds(labels, scores, 0.85, 0.9, grid)
        assert above.knows_from == (0.5 if significant else None), k
        # Mirrored: knows_from is undefined, and unknown_below is not limited by it.
        below = guaranteed_thresholds(~labels, -scores, 0.85, 0.9, np.negative(grid))
        assert below.knows_from is not None or below.unknown_below == (-0.5 if significant else None), k
        assert not significant or below == (None, -0.5), k
    assert tail(n) > Fraction(1, 20) / 19 or n >= 37  # 36 items are too few even if all are correct


def too_low(chance: Chance, thresholds: Thresholds, target: float) -> tuple[bool, bool]:
    """Returns whether the true precisions (knows_from, unknown_below) for uniform scores on [0, 1] are below
    the target.
    """
    dense = (np.arange(20_000) + 0.5) / 20_000
    knows_from, unknown_below = thresholds
    known = chance(dense[dense >= knows_from]) if knows_from is not None else dense[:0]
    unknown = 1 - chance(dense[dense < unknown_below]) if unknown_below is not None else dense[:0]
    return known.size > 0 and known.mean() < target, unknown.size > 0 and unknown.mean() < target


def just_short(scores: np.ndarray) -> np.ndarray:
    """The precision is 0.845 in both halves, just below 0.85: no threshold may be guaranteed."""
    return np.where(scores >= 0.5, 0.845, 0.155)


def rising(scores: np.ndarray) -> np.ndarray:
    """knows_from is valid from 0.46 on, unknown_below up to 0.54: both may be guaranteed up to the middle."""
    return 1 / (1 + np.exp(-12 * (scores - 0.5)))


@draws(100, 400)
@pytest.mark.parametrize("chance", [just_short, rising])
def test_guarantees_hold_where_the_rank_rule_fails(chance: Chance, n: int) -> None:
    """Over many calibration sets, the guarantee fails no more often than the confidence allows."""
    rng = np.random.default_rng(0)
    target, confidence = 0.85, 0.9
    allowed = n * (1 - confidence)
    slack = 3 * np.sqrt(allowed * confidence)
    guaranteed_failures, rank_failures, uncorrected_failures, complete = 0, 0, 0, 0
    for _ in range(n):
        scores = rng.random(450)
        labels = (rng.random(450) < chance(scores)).astype(int)
        guaranteed = guaranteed_thresholds(labels, scores, target, confidence)
        guaranteed_failures += any(too_low(chance, guaranteed, target))
        complete += None not in guaranteed
        rank_failures += any(too_low(chance, precision_thresholds(labels, scores, target), target))
        single = [guaranteed_thresholds(labels, scores, target, confidence, [candidate])
                  for candidate in GRID]
        uncorrected_failures += any(any(too_low(chance, pair, target)) for pair in single)
    assert guaranteed_failures <= allowed + slack
    assert rank_failures > 5 * allowed
    if chance is just_short:
        assert allowed + slack < uncorrected_failures, "uncorrected tests fail more often than allowed"
    else:
        assert complete > 0.95 * n, "valid thresholds are found"


def test_a_single_threshold_uses_the_full_error_probability() -> None:
    """With one candidate there is no correction: each side fails with half the error probability."""
    rng = np.random.default_rng(1)
    n, sets = 2000, 4000
    known = rng.binomial(n, 0.85, sets)  # precision just at the target
    guaranteed = {k: guaranteed_thresholds(np.arange(n) < k, np.ones(n), 0.85, 0.8,
                                           [0.5]).knows_from is not None
                  for k in np.unique(known)}
    fraction = np.mean([guaranteed[k] for k in known])
    assert 0.08 < fraction < 0.1 + 3 * np.sqrt(0.09 / sets)


@given(ITEMS, st.sampled_from((0.3, 0.6, 0.9)))
def test_red_is_never_above_green(items: list[tuple[bool, int]], target: float) -> None:
    labels, scores = to_arrays(items)
    knows_from, unknown_below = guaranteed_thresholds(labels, scores, target, 0.5)
    assert knows_from is None or unknown_below is None or unknown_below <= knows_from
    # Mirrored items, with a grid on which no score lies.
    grid = np.array(GRID) + 0.003
    ours = guaranteed_thresholds(labels, scores, target, 0.5, grid)
    mirrored = guaranteed_thresholds(1 - labels, -scores, target, 0.5, -grid)
    if ours.knows_from is None:
        assert mirrored.knows_from == (None if ours.unknown_below is None else -ours.unknown_below)


def test_a_score_on_the_threshold_counts_for_green() -> None:
    scores, grid = np.full(100, 0.5), [0.5]
    assert guaranteed_thresholds(np.ones(100), scores, 0.85, 0.9, grid) == (0.5, None)
    assert guaranteed_thresholds(np.zeros(100), scores, 0.85, 0.9, grid) == (None, None)


def test_green_takes_precedence_if_both_could_be_guaranteed() -> None:
    """Two well-separated clusters: at a low target each verdict could be given to all items."""
    labels, scores = np.repeat([0, 1], 500), np.repeat([0.2, 0.8], 500)
    grid = (0.1, 0.5, 0.9)
    assert guaranteed_thresholds(labels, scores, 0.4, 0.9, grid) == (0.1, None)
    assert guaranteed_thresholds(labels, scores, 0.9, 0.9, grid) == (0.5, 0.5)


def test_invalid_arguments_are_rejected() -> None:
    labels, scores = [0, 1], [0.2, 0.8]
    for target in (0.0, 1.0):
        with pytest.raises(ValueError, match="target"):
            guaranteed_thresholds(labels, scores, target, 0.9)
        with pytest.raises(ValueError, match="target"):
            precision_thresholds(labels, scores, target)
    with pytest.raises(ValueError, match="confidence"):
        guaranteed_thresholds(labels, scores, 0.8, 1.0)
    for grid in ([], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="grid"):
            guaranteed_thresholds(labels, scores, 0.8, 0.9, grid)
    with pytest.raises(ValueError, match="labels"):
        guaranteed_thresholds([0, 2], scores, 0.8, 0.9)
    with pytest.raises(ValueError, match="scores"):
        precision_thresholds(labels, [0.1, float("nan")], 0.8)


# --- Abstention ------------------------------------------------------------------------------


def test_a_conformal_threshold_by_hand() -> None:
    threshold = conformal_threshold([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0], 0.2)
    assert threshold.value == 8.0 and threshold.measured == 1 / 9  # the ⌈10 · 0.8⌉-th
    assert threshold.expected.point == 0.2
    assert threshold.expected[1:] == pytest.approx(scipy.stats.beta(2, 8).ppf([0.025, 0.975]))
    few_groups_warning, tied = conformal_threshold([1.0, 2.0], 0.2), conformal_threshold(np.ones(50), 0.1)
    assert few_groups_warning.value == math.inf and few_groups_warning.expected == (0, 0, 0)
    assert tied.value == 1.0 and tied.measured == 0
    for scores, target in (([], 0.1), ([math.nan], 0.1), ([[1.0]], 0.1), ([1.0], 0.0), ([1.0], 1.0)):
        with pytest.raises(ValueError, match="expected"):
            conformal_threshold(scores, target)


@draws(300, 1000)
@pytest.mark.parametrize(("items", "target"), [(60, 0.05), (200, 0.1), (37, 0.27)])
def test_a_conformal_threshold_has_its_nominal_rates(items: int, target: float, n: int) -> None:
    """Over many calibrations the mean true rate is at most the target, and the range is as expected."""
    rng = np.random.default_rng(items)
    truth = scipy.stats.norm.isf(target)
    rates, covered = [], 0
    for _ in range(n):
        threshold = conformal_threshold(rng.standard_normal(items), target)
        rates.append(scipy.stats.norm.sf(threshold.value))
        covered += threshold.interval.low <= truth <= threshold.interval.high
    error = np.std(rates) / math.sqrt(n)
    assert threshold.expected.point - 4 * error < np.mean(rates) < target + 4 * error
    inside = np.mean([threshold.expected.low <= rate <= threshold.expected.high for rate in rates])
    assert abs(inside - 0.95) < 4 * math.sqrt(0.95 * 0.05 / n)
    assert covered / n > 0.95 - 4 * math.sqrt(0.95 * 0.05 / n)


@pytest.mark.parametrize("target", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_minimum_number_of_scores_of_a_conformal_threshold(target: float) -> None:
    minimum = conformal_min_items(target)
    assert math.isfinite(conformal_threshold(np.arange(minimum), target).value)
    assert minimum == 1 or math.isinf(conformal_threshold(np.arange(minimum - 1), target).value)
