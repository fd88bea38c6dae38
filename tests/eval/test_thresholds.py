"""Thresholds against Recall's, against exact sums, and against what they promise of unseen items."""

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
from tilelli_jax.eval.thresholds import (
    GRID,
    Thresholds,
    conformal_min_items,
    conformal_threshold,
    guaranteed_thresholds,
    precision_thresholds,
    verdict,
)

from tests.eval.running import draws
from tests.references import STORED, needs

CASES = STORED / "recall_cases" / "metric_cases.npz"
Chance = Callable[[np.ndarray], np.ndarray]  # of a 1, by the score
ITEMS = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=40)


def taken_apart(items: list[tuple[bool, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([int(label) for label, _ in items]), np.array([score / 8 for _, score in items])


@needs(CASES)
def test_the_rule_of_ranks_is_recalls() -> None:
    with np.load(CASES, allow_pickle=False) as cases:
        numbers = sorted({name.partition("/")[0] for name in cases})
        assert len(numbers) == 4
        for k in numbers:
            found = precision_thresholds(cases[f"{k}/y"], cases[f"{k}/p"], 0.85)
            assert found == (cases[f"{k}/green"], cases[f"{k}/red"])


@given(ITEMS, st.sampled_from((0.5, 0.75, 0.85)))
def test_the_rule_of_ranks_rank_by_rank(items: list[tuple[bool, int]], target: float) -> None:
    def last(ranked: list[tuple[bool, int]], right: bool) -> float | None:
        found = None
        for k in range(1, len(ranked) + 1):
            if sum(label == right for label, _ in ranked[:k]) >= target * k:
                found = ranked[k - 1][1] / 8
        return found
    down, up = sorted(items, key=lambda item: -item[1]), sorted(items, key=lambda item: item[1])
    assert precision_thresholds(*taken_apart(items), target) == (last(down, True), last(up, False))


def test_verdicts() -> None:
    said = [verdict(score, 0.8, 0.3) for score in (0.9, 0.8, 0.79, 0.3, 0.29)]
    assert said == ["likely knows"] * 2 + ["uncertain"] * 2 + ["likely beyond its knowledge"]
    assert [verdict(score, 0.4, 0.7) for score in (0.8, 0.5, 0.4, 0.39)] == [
        "likely knows", "likely knows", "likely knows", "likely beyond its knowledge"]
    assert [verdict(score, None, None) for score in (0.0, 1.0)] == ["uncertain", "uncertain"]
    assert verdict(0.1, None, 0.2) == "likely beyond its knowledge"
    assert verdict(1, 0.9, None) == "likely knows"
    with pytest.raises(ValueError, match="score"):
        verdict(float("nan"), 0.8, 0.3)


# --- Promises --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 36, 37, 45, 100])
@pytest.mark.parametrize("thresholds", [1, 19])
def test_a_promise_is_made_from_just_as_many_right_as_it_takes(n: int, thresholds: int) -> None:
    """The exact binomial tail, in whole numbers; beyond the grid's other thresholds there is no item."""
    grid = [0.5, *np.linspace(2, 3, thresholds - 1)]
    def tail(k: int) -> Fraction:
        t = Fraction(17, 20)
        return sum((comb(n, i) * t**i * (1 - t) ** (n - i) for i in range(k, n + 1)), Fraction(0))
    for k in range(n + 1):
        labels, scores = np.arange(n) < k, np.full(n, 0.75)
        enough = tail(k) <= Fraction(1, 20) / thresholds
        above = guaranteed_thresholds(labels, scores, 0.85, 0.9, grid)
        assert above.green == (0.5 if enough else None), k
        # Without green, which would hold red back.
        below = guaranteed_thresholds(~labels, -scores, 0.85, 0.9, np.negative(grid))
        assert below.green is not None or below.red == (-0.5 if enough else None), k
        assert not enough or below == (None, -0.5), k
    assert tail(n) > Fraction(1, 20) / 19 or n >= 37  # of 36, not even all of them are enough


def too_low(chance: Chance, found: Thresholds, target: float) -> tuple[bool, bool]:
    """Whether the true precisions, of scores that are uniform on [0, 1], lie below the target."""
    dense = (np.arange(20_000) + 0.5) / 20_000
    green, red = found
    known = chance(dense[dense >= green]) if green is not None else dense[:0]
    unknown = 1 - chance(dense[dense < red]) if red is not None else dense[:0]
    return known.size > 0 and known.mean() < target, unknown.size > 0 and unknown.mean() < target


def just_short(scores: np.ndarray) -> np.ndarray:
    """Of the upper half 1 in 200 too few is known, of the lower too many: nothing may be promised."""
    return np.where(scores >= 0.5, 0.845, 0.155)


def rising(scores: np.ndarray) -> np.ndarray:
    """Green holds from 0.46 on, red up to 0.54: either may be promised up to the middle."""
    return 1 / (1 + np.exp(-12 * (scores - 0.5)))


@draws(100, 400)
@pytest.mark.parametrize("chance", [just_short, rising])
def test_promises_are_kept_which_the_rule_of_ranks_does_not_keep(chance: Chance, n: int) -> None:
    """Over many calibration sets: too much is promised by no more of them than the confidence allows."""
    rng = np.random.default_rng(0)
    target, confidence = 0.85, 0.9
    allowed = n * (1 - confidence)
    slack = 3 * np.sqrt(allowed * confidence)
    promised, ranked, uncorrected, made = 0, 0, 0, 0
    for _ in range(n):
        scores = rng.random(450)
        labels = (rng.random(450) < chance(scores)).astype(int)
        found = guaranteed_thresholds(labels, scores, target, confidence)
        promised += any(too_low(chance, found, target))
        made += None not in found
        ranked += any(too_low(chance, precision_thresholds(labels, scores, target), target))
        alone = [guaranteed_thresholds(labels, scores, target, confidence, [line]) for line in GRID]
        uncorrected += any(any(too_low(chance, one, target)) for one in alone)
    assert promised <= allowed + slack
    assert ranked > 5 * allowed
    if chance is just_short:
        assert allowed + slack < uncorrected, "thresholds of which each is tested alone promise too much"
    else:
        assert made > 0.95 * n, "what may be promised is found"


def test_one_threshold_errs_as_often_as_it_may() -> None:
    """The confidence is used up where there is nothing to correct for: half of it by either side."""
    rng = np.random.default_rng(1)
    n, sets = 2000, 4000
    known = rng.binomial(n, 0.85, sets)  # at the target: to promise more than it is wrong
    made = {k: guaranteed_thresholds(np.arange(n) < k, np.ones(n), 0.85, 0.8, [0.5]).green is not None
            for k in np.unique(known)}
    share = np.mean([made[k] for k in known])
    assert 0.08 < share < 0.1 + 3 * np.sqrt(0.09 / sets)


@given(ITEMS, st.sampled_from((0.3, 0.6, 0.9)))
def test_green_is_never_below_red(items: list[tuple[bool, int]], target: float) -> None:
    labels, scores = taken_apart(items)
    green, red = guaranteed_thresholds(labels, scores, target, 0.5)
    assert green is None or red is None or red <= green
    # The same items seen from the other side, where no score lies on a threshold.
    grid = np.array(GRID) + 0.003
    ours = guaranteed_thresholds(labels, scores, target, 0.5, grid)
    other = guaranteed_thresholds(1 - labels, -scores, target, 0.5, -grid)
    if ours.green is None:
        assert other.green == (None if ours.red is None else -ours.red)


def test_a_score_on_the_threshold_is_greens() -> None:
    scores, grid = np.full(100, 0.5), [0.5]
    assert guaranteed_thresholds(np.ones(100), scores, 0.85, 0.9, grid) == (0.5, None)
    assert guaranteed_thresholds(np.zeros(100), scores, 0.85, 0.9, grid) == (None, None)


def test_green_wins_where_both_could_be_promised() -> None:
    """Two heaps, parted well: at a low target, "knows" and "does not" could be said of everything."""
    labels, scores = np.repeat([0, 1], 500), np.repeat([0.2, 0.8], 500)
    wide = (0.1, 0.5, 0.9)
    assert guaranteed_thresholds(labels, scores, 0.4, 0.9, wide) == (0.1, None)
    assert guaranteed_thresholds(labels, scores, 0.9, 0.9, wide) == (0.5, 0.5)


def test_what_is_refused() -> None:
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


# --- Declining -------------------------------------------------------------------------------


def test_a_conformal_threshold_by_hand() -> None:
    found = conformal_threshold([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0], 0.2)
    assert found.value == 8.0 and found.measured == 1 / 9  # the ⌈10 · 0.8⌉-th
    assert found.expected.point == 0.2
    assert found.expected[1:] == pytest.approx(scipy.stats.beta(2, 8).ppf([0.025, 0.975]))
    few, equal = conformal_threshold([1.0, 2.0], 0.2), conformal_threshold(np.ones(50), 0.1)
    assert few.value == math.inf and few.expected == (0, 0, 0)
    assert equal.value == 1.0 and equal.measured == 0
    for scores, target in (([], 0.1), ([math.nan], 0.1), ([[1.0]], 0.1), ([1.0], 0.0), ([1.0], 1.0)):
        with pytest.raises(ValueError, match="expected"):
            conformal_threshold(scores, target)


@draws(300, 1000)
@pytest.mark.parametrize(("items", "target"), [(60, 0.05), (200, 0.1), (37, 0.27)])
def test_a_conformal_threshold_keeps_its_promises(items: int, target: float, n: int) -> None:
    """Of many calibrations the true rates' mean is at most the target, and their range as foreseen."""
    rng = np.random.default_rng(items)
    truth = scipy.stats.norm.isf(target)
    rates, covered = [], 0
    for _ in range(n):
        found = conformal_threshold(rng.standard_normal(items), target)
        rates.append(scipy.stats.norm.sf(found.value))
        covered += found.interval.low <= truth <= found.interval.high
    error = np.std(rates) / math.sqrt(n)
    assert found.expected.point - 4 * error < np.mean(rates) < target + 4 * error
    inside = np.mean([found.expected.low <= rate <= found.expected.high for rate in rates])
    assert abs(inside - 0.95) < 4 * math.sqrt(0.95 * 0.05 / n)
    assert covered / n > 0.95 - 4 * math.sqrt(0.95 * 0.05 / n)


@pytest.mark.parametrize("target", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_how_many_scores_a_conformal_threshold_takes(target: float) -> None:
    least = conformal_min_items(target)
    assert math.isfinite(conformal_threshold(np.arange(least), target).value)
    assert least == 1 or math.isinf(conformal_threshold(np.arange(least - 1), target).value)
