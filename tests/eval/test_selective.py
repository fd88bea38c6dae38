"""Risk and coverage compared with brute force over all orders of ties, and with closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval.running import draws
from tilelli_jax.eval import selective

ITEMS = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 2)), min_size=1, max_size=6)


def all_orders(errors: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the mean of the risks over every order that the scores allow."""
    risks = [np.cumsum(errors[list(order)]) / np.arange(1, len(errors) + 1)
             for order in itertools.permutations(range(len(errors)))
             if (np.diff(scores[list(order)]) >= 0).all()]
    return np.mean(risks, axis=0)


@given(ITEMS)
def test_expected_risks(items: list[tuple[float, int]]) -> None:
    errors, scores = (np.array(column, float) for column in zip(*items, strict=True))
    expected = all_orders(errors, scores)
    np.testing.assert_allclose(selective.Ranking(errors, scores).risks(), expected, atol=1e-12)
    assert math.isclose(selective.aurc(errors, scores), expected.mean(), abs_tol=1e-12)


@given(ITEMS, st.integers(0, 2**32 - 1))
def test_weights_equal_repeated_items(items: list[tuple[float, int]], seed: int) -> None:
    errors, scores = (np.array(column, float) for column in zip(*items, strict=True))
    weights = np.random.default_rng(seed).integers(0, 4, len(errors))
    weights[0] += 1
    repeated = selective.Ranking(np.repeat(errors, weights), np.repeat(scores, weights))
    weighted = selective.Ranking(errors, scores)
    np.testing.assert_allclose(weighted.risks(weights=weights), repeated.risks(), atol=1e-12)
    np.testing.assert_allclose(weighted.risks([0.3, 1.0], weights), repeated.risks([0.3, 1.0]), atol=1e-12)


def test_a_constant_score_equals_random_order() -> None:
    """It has no part of the oracle's gain at any coverage, however a sort orders its ties."""
    errors = np.random.default_rng(0).integers(0, 2, 72)
    curve = selective.risk_coverage(errors, np.full(72, 0.5), replicates=200)
    np.testing.assert_allclose(curve.risks, errors.mean())
    assert curve.prr.point == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(curve.prr[1:], 0, atol=1e-12)


def test_the_oracle_and_its_opposite() -> None:
    errors = np.repeat([0.0, 1.0], [60, 40])
    assert selective.prr(errors, errors) == 1.0
    assert selective.prr(errors, -errors) < -1
    assert math.isnan(selective.prr(np.ones(5), np.arange(5.0)))
    # The oracle's risk is 0 up to 60 % coverage, then (k − 60) / k.
    k = np.arange(1, 101)
    assert selective.aurc(errors, errors) == pytest.approx(np.mean(np.maximum(0, k - 60) / k))


def rejection_area(qualities: np.ndarray, certainty: np.ndarray, rejected: int) -> float:
    """The mean quality of those kept while the `rejected` least certain items go, one at a time."""
    kept = list(np.argsort(-certainty, kind="stable"))
    means = []
    for _ in range(rejected):
        means.append(np.mean([qualities[i] for i in kept]))
        kept.pop()
    return float(np.mean(means))


@pytest.mark.parametrize("max_rejection", [1.0, 0.5, 0.31])
def test_prr(max_rejection: float) -> None:
    """By the definition of LM-Polygraph: qualities, and certainty in place of scores."""
    rng = np.random.default_rng(0)
    for n in (4, 7, 50):
        errors, scores = rng.random(n).round(1), rng.standard_normal(n)
        rejected = int(max_rejection * n)
        if rejected < 2:
            assert math.isnan(selective.prr(errors, scores, max_rejection))
            continue
        areas = [rejection_area(1 - errors, certainty, rejected) for certainty in (-scores, -errors)]
        expected = (areas[0] - np.mean(1 - errors)) / (areas[1] - np.mean(1 - errors))
        assert selective.prr(errors, scores, max_rejection) == pytest.approx(expected, abs=1e-12)


@given(ITEMS, st.sampled_from([0.5, 1.0]))
def test_prr_of_ties_is_the_expected_one(items: list[tuple[float, int]], max_rejection: float) -> None:
    errors, scores = (np.array(column, float) for column in zip(*items, strict=True))
    found, rejected = selective.prr(errors, scores, max_rejection), int(max_rejection * len(errors))
    if rejected < 2 or np.ptp(errors) < 1e-6:
        return
    area, oracle = (all_orders(errors, order)[-rejected:].mean() for order in (scores, errors))
    assert found == pytest.approx((errors.mean() - area) / (errors.mean() - oracle), rel=1e-6, abs=1e-6)


def test_equal_errors_have_no_oracle() -> None:
    """Sums of equal errors differ by rounding, and so do computed errors."""
    for errors in ([0.1] * 10, [0.1, 0.3 - 0.2] * 5):
        assert math.isnan(selective.prr(errors, range(10)))
        fraction = selective.risk_coverage(errors, range(10), replicates=200).prr
        assert all(map(math.isnan, fraction))
    curve = selective.risk_coverage([0.1, 0.1, 0.1, 0.9], range(4), replicates=200)
    assert curve.prr == pytest.approx((1, 1, 1))  # over the replicates with both errors


@draws(40, 200)
def test_intervals_cover_the_risk(n: int) -> None:
    """P(error) = score, uniform: risk c / 2 at coverage c, AURC 1/4. 95 % of the intervals cover them."""
    rng, hits = np.random.default_rng(0), np.zeros(3)
    for _ in range(n):
        scores = rng.random(300)
        errors = rng.random(300) < scores
        curve = selective.risk_coverage(errors, scores, coverages=(0.3, 0.8), replicates=200)
        truth = np.array([0.15, 0.4])
        hits[:2] += (curve.low <= truth) & (truth <= curve.high)
        hits[2] += curve.aurc.low <= 0.25 <= curve.aurc.high
    assert (np.abs(hits / n - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / n)).all(), hits


def test_invalid_input_is_rejected() -> None:
    with pytest.raises(ValueError, match="equal length"):
        selective.aurc([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"scores: expected numbers, found NaN for 1 of 2 items"):
        selective.aurc([1.0, 2.0], [1.0, math.nan])
