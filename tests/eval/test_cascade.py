"""The cascade against handing on item by item."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilelli_jax.eval.cascade import Costs, against_random_routing, frontier, oracle_frontier

ITEMS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30)


@given(ITEMS, st.booleans())
def test_each_threshold(items: list[tuple[int, int, int]], pay_both: bool) -> None:
    small, large, scores = (np.array(column, float) for column in zip(*items, strict=True))
    costs = Costs(1.0, 4.0, pay_both=pay_both)
    found = frontier(small, large, scores, costs)
    assert found.thresholds.tolist() == [*sorted(set(scores.tolist())), np.inf]
    for i, threshold in enumerate(found.thresholds):
        handed = scores >= threshold
        assert found.errors[i] == pytest.approx(np.where(handed, large, small).mean())
        assert found.handed_on[i] == pytest.approx(handed.mean())
        assert found.costs[i] == pytest.approx(np.where(handed, 4.0 + pay_both, 1.0).mean())


@given(ITEMS)
def test_nobody_beats_the_oracle(items: list[tuple[int, int, int]]) -> None:
    small, large, scores = (np.array(column, float) for column in zip(*items, strict=True))
    found, best = frontier(small, large, scores, Costs()), oracle_frontier(small, large, Costs())
    for share, error in zip(found.handed_on, found.errors, strict=True):
        assert best.errors[round(share * len(small))] <= error + 1e-12


def test_pareto_and_dominating() -> None:
    """A score that knows where the dear model helps; one that knows nothing lies on the line."""
    small, large = np.repeat([1.0, 0.0], 50), np.zeros(100)
    knows = frontier(small, large, small, Costs())
    assert knows.errors.tolist() == [0.0, 0.0, 0.5] and knows.handed_on.tolist() == [1.0, 0.5, 0.0]
    assert knows.pareto().tolist() == [False, True, True]  # handing on everything is no better, and dearer
    assert knows.dominating(0.5, 0.0, Costs()).tolist() == [False, True, False]
    ignorant = frontier(small, large, np.tile([0.0, 1.0], 50), Costs())
    assert not ignorant.dominating(0.5, 0.0, Costs()).any()


def test_points_that_differ_by_rounding_are_equal() -> None:
    """All errors 0.2 on average: the cheapest point alone. All costs 0.9: the best point alone."""
    found = frontier([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [1, 2, 3], Costs())
    assert len(set(found.errors.tolist())) > 1 and found.pareto().tolist() == [False, False, False, True]
    for size in (1e-12, 1e12):  # whatever the errors are measured in
        small = size * np.array([1.0, 2.0, 3.0])
        found = frontier(small, 0.5 * small, [1, 2, 3], Costs())
        assert found.pareto().all()
        assert found.dominating(small.mean(), 0.5 * small.mean(), Costs()).tolist() == [
            False, False, True, False]
        free = frontier(small, 0.5 * small, [1, 2, 3], Costs(pay_both=False))
        assert free.dominating(small.mean(), 0.5 * small.mean(), Costs(pay_both=False)).tolist() == [
            False, True, True, False]
    small = (np.arange(10) >= 3).astype(float)
    found = frontier(small, 1 - small, np.arange(10), Costs(0.9, 0.9, pay_both=False))
    assert len(set(found.costs.tolist())) > 1
    assert np.flatnonzero(found.pareto()).tolist() == [3] and found.errors[3] == 0


def test_a_coin_that_differs_by_rounding_is_no_better() -> None:
    for share in (0.1, 0.3, 0.7):
        found = against_random_routing(np.ones(7), np.zeros(7), np.ones(7), Costs(1, 5, pay_both=False), share)
        assert found == (0, 0, 0) and not found.excludes_zero


def test_what_is_sunk_is_paid() -> None:
    """All that go to the dear model have cost the cheap call, too: here nothing is left below 5."""
    small, large = np.repeat([1.0, 0.0], [90, 10]), np.zeros(100)
    found = frontier(small, large, small, Costs())
    assert found.costs.tolist() == [6.0, 5.5, 1.0] and not found.dominating(0.9, 0.0, Costs()).any()
    free = frontier(small, large, small, Costs(pay_both=False))
    assert free.dominating(0.9, 0.0, Costs(pay_both=False)).tolist() == [False, True, False]


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one length"):
        frontier([1.0], [1.0, 2.0], [0.5], Costs())


def test_a_share_said_beforehand_against_a_coin() -> None:
    """By hand; equal scores at the edge are handed on in part."""
    small, large, scores = np.array([1.0, 1, 0, 0]), np.zeros(4), np.array([0.9, 0.9, 0.1, 0.2])
    costs = Costs(1.0, 5.0, pay_both=True)
    # A quarter handed on costs 1 + 5/4, for which the coin hands on (5/4) / 4 = 0.3125 of the items.
    found = against_random_routing(small, large, scores, costs, 0.25)
    assert found.point == pytest.approx((0.5 - 0.25) - (0.5 - 0.3125 * 0.5))
    assert found.low <= found.point <= found.high
    half = against_random_routing(small, large, scores, Costs(1.0, 5.0, pay_both=False), 0.5)
    assert half.point == pytest.approx(0 - 0.25)
    assert against_random_routing(small, large, np.ones(4), Costs(1, 5, pay_both=False), 0.5).point == pytest.approx(0)


def test_a_score_that_knows_nothing_beats_no_coin() -> None:
    """Of 200 of them, 5 % have an interval on one side of 0 by chance: here at most twice as many."""
    rng = np.random.default_rng(0)
    costs, beyond = Costs(1.0, 5.0, pay_both=False), 0
    for _ in range(200):
        small = (rng.random(300) < 0.4).astype(float)
        large = (rng.random(300) < 0.3).astype(float)
        found = against_random_routing(small, large, rng.random(300), costs, 0.25, replicates=400)
        beyond += found.excludes_zero
    assert beyond <= 20
