"""The cascade compared with routing item by item, with the oracle, and with random routing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.eval.cascade import Costs, against_random_routing, frontier, oracle_frontier

ITEMS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30)


@given(ITEMS, st.booleans())
def test_each_threshold(items: list[tuple[int, int, int]], routed_pays_both: bool) -> None:
    small, large, scores = (np.array(column, float) for column in zip(*items, strict=True))
    costs = Costs(1.0, 4.0, routed_pays_both=routed_pays_both)
    points = frontier(small, large, scores, costs)
    assert points.thresholds.tolist() == [*sorted(set(scores.tolist())), np.inf]
    for i, threshold in enumerate(points.thresholds):
        routed = scores >= threshold
        assert points.errors[i] == pytest.approx(np.where(routed, large, small).mean())
        assert points.routed_fraction[i] == pytest.approx(routed.mean())
        assert points.costs[i] == pytest.approx(np.where(routed, 4.0 + routed_pays_both, 1.0).mean())


@given(ITEMS)
def test_no_score_beats_the_oracle(items: list[tuple[int, int, int]]) -> None:
    small, large, scores = (np.array(column, float) for column in zip(*items, strict=True))
    points, oracle = frontier(small, large, scores, Costs()), oracle_frontier(small, large, Costs())
    for fraction, error in zip(points.routed_fraction, points.errors, strict=True):
        assert oracle.errors[round(fraction * len(small))] <= error + 1e-12


def test_pareto_and_dominating() -> None:
    """A perfect score, and an uninformative one, which lies on the line of random routing."""
    small, large = np.repeat([1.0, 0.0], 50), np.zeros(100)
    perfect = frontier(small, large, small, Costs())
    assert perfect.errors.tolist() == [0.0, 0.0, 0.5] and perfect.routed_fraction.tolist() == [1.0, 0.5, 0.0]
    assert perfect.pareto().tolist() == [False, True, True]  # routing everything is no better and costs more
    assert perfect.dominating(0.5, 0.0, Costs()).tolist() == [False, True, False]
    uninformative = frontier(small, large, np.tile([0.0, 1.0], 50), Costs())
    assert not uninformative.dominating(0.5, 0.0, Costs()).any()


def test_points_that_differ_by_rounding_count_as_equal() -> None:
    """With equal mean errors only the cheapest point is optimal; with equal costs, only the best one."""
    points = frontier([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [1, 2, 3], Costs())
    assert len(set(points.errors.tolist())) > 1 and points.pareto().tolist() == [False, False, False, True]
    for size in (1e-12, 1e12):  # independent of the unit of the errors
        small = size * np.array([1.0, 2.0, 3.0])
        points = frontier(small, 0.5 * small, [1, 2, 3], Costs())
        assert points.pareto().all()
        assert points.dominating(small.mean(), 0.5 * small.mean(), Costs()).tolist() == [
            False, False, True, False]
        without_sunk_cost = frontier(small, 0.5 * small, [1, 2, 3], Costs(routed_pays_both=False))
        assert without_sunk_cost.dominating(
            small.mean(), 0.5 * small.mean(),
            Costs(routed_pays_both=False)).tolist() == [False, True, True, False]
    small = (np.arange(10) >= 3).astype(float)
    points = frontier(small, 1 - small, np.arange(10), Costs(0.9, 0.9, routed_pays_both=False))
    assert len(set(points.costs.tolist())) > 1
    assert np.flatnonzero(points.pareto()).tolist() == [3] and points.errors[3] == 0


def test_a_constant_score_equals_random_routing() -> None:
    for fraction in (0.1, 0.3, 0.7):
        difference = against_random_routing(np.ones(7), np.zeros(7), np.ones(7),
                                            Costs(1, 5, routed_pays_both=False),
                                            fraction)
        assert difference == (0, 0, 0) and not difference.excludes_zero


def test_routed_items_also_pay_for_the_small_model() -> None:
    """With `routed_pays_both` no point but the unrouted one costs less than 5, so none can dominate."""
    small, large = np.repeat([1.0, 0.0], [90, 10]), np.zeros(100)
    points = frontier(small, large, small, Costs())
    assert points.costs.tolist() == [6.0, 5.5, 1.0] and not points.dominating(0.9, 0.0, Costs()).any()
    without_sunk_cost = frontier(small, large, small, Costs(routed_pays_both=False))
    dominating = without_sunk_cost.dominating(0.9, 0.0, Costs(routed_pays_both=False))
    assert dominating.tolist() == [False, True, False]


def test_errors_of_unequal_length_are_rejected() -> None:
    with pytest.raises(ValueError, match="equal length"):
        frontier([1.0], [1.0, 2.0], [0.5], Costs())


def test_a_fixed_fraction_compared_with_random_routing_by_hand() -> None:
    """Items tied at the threshold are routed in part."""
    small, large, scores = np.array([1.0, 1, 0, 0]), np.zeros(4), np.array([0.9, 0.9, 0.1, 0.2])
    costs = Costs(1.0, 5.0, routed_pays_both=True)
    # Routing a quarter costs 1 + 5/4. At that cost random routing sends (5/4) / 4 = 0.3125 of the items.
    difference = against_random_routing(small, large, scores, costs, 0.25)
    assert difference.point == pytest.approx((0.5 - 0.25) - (0.5 - 0.3125 * 0.5))
    assert difference.low <= difference.point <= difference.high
    at_half = against_random_routing(small, large, scores, Costs(1.0, 5.0, routed_pays_both=False), 0.5)
    assert at_half.point == pytest.approx(0 - 0.25)
    constant = against_random_routing(small, large, np.ones(4), Costs(1, 5, routed_pays_both=False), 0.5)
    assert constant.point == pytest.approx(0)


def test_an_uninformative_score_does_not_beat_random_routing() -> None:
    """By chance 5 % of 200 intervals exclude 0; the test accepts at most twice as many."""
    rng = np.random.default_rng(0)
    costs, excluding_zero = Costs(1.0, 5.0, routed_pays_both=False), 0
    for _ in range(200):
        small = (rng.random(300) < 0.4).astype(float)
        large = (rng.random(300) < 0.3).astype(float)
        difference = against_random_routing(small, large, rng.random(300), costs, 0.25, replicates=400)
        excluding_zero += difference.excludes_zero
    assert excluding_zero <= 20
