"""The cascade against handing on item by item."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilelli_jax.eval.cascade import Costs, against_coin, frontier, oracle_frontier

ITEMS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30)


@given(ITEMS, st.booleans())
def test_each_threshold(items: list[tuple[int, int, int]], sunk: bool) -> None:
    cheap, dear, scores = (np.array(column, float) for column in zip(*items, strict=True))
    costs = Costs(1.0, 4.0, sunk=sunk)
    found = frontier(cheap, dear, scores, costs)
    assert found.thresholds.tolist() == [*sorted(set(scores.tolist())), np.inf]
    for i, threshold in enumerate(found.thresholds):
        handed = scores >= threshold
        assert found.errors[i] == pytest.approx(np.where(handed, dear, cheap).mean())
        assert found.handed_on[i] == pytest.approx(handed.mean())
        assert found.costs[i] == pytest.approx(np.where(handed, 4.0 + sunk, 1.0).mean())


@given(ITEMS)
def test_nobody_beats_the_oracle(items: list[tuple[int, int, int]]) -> None:
    cheap, dear, scores = (np.array(column, float) for column in zip(*items, strict=True))
    found, best = frontier(cheap, dear, scores, Costs()), oracle_frontier(cheap, dear, Costs())
    for share, error in zip(found.handed_on, found.errors, strict=True):
        assert best.errors[round(share * len(cheap))] <= error + 1e-12


def test_pareto_and_dominating() -> None:
    """A score that knows where the dear model helps; one that knows nothing lies on the line."""
    cheap, dear = np.repeat([1.0, 0.0], 50), np.zeros(100)
    knows = frontier(cheap, dear, cheap, Costs())
    assert knows.errors.tolist() == [0.0, 0.0, 0.5] and knows.handed_on.tolist() == [1.0, 0.5, 0.0]
    assert knows.pareto().tolist() == [False, True, True]  # handing on everything is no better, and dearer
    assert knows.dominating(0.5, 0.0, Costs()).tolist() == [False, True, False]
    ignorant = frontier(cheap, dear, np.tile([0.0, 1.0], 50), Costs())
    assert not ignorant.dominating(0.5, 0.0, Costs()).any()


def test_points_that_differ_by_rounding_are_equal() -> None:
    """All errors 0.2 on average: the cheapest point alone. All costs 0.9: the best point alone."""
    found = frontier([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [1, 2, 3], Costs())
    assert len(set(found.errors.tolist())) > 1 and found.pareto().tolist() == [False, False, False, True]
    for size in (1e-12, 1e12):  # whatever the errors are measured in
        cheap = size * np.array([1.0, 2.0, 3.0])
        found = frontier(cheap, 0.5 * cheap, [1, 2, 3], Costs())
        assert found.pareto().all()
        assert found.dominating(cheap.mean(), 0.5 * cheap.mean(), Costs()).tolist() == [
            False, False, True, False]
        free = frontier(cheap, 0.5 * cheap, [1, 2, 3], Costs(sunk=False))
        assert free.dominating(cheap.mean(), 0.5 * cheap.mean(), Costs(sunk=False)).tolist() == [
            False, True, True, False]
    cheap = (np.arange(10) >= 3).astype(float)
    found = frontier(cheap, 1 - cheap, np.arange(10), Costs(0.9, 0.9, sunk=False))
    assert len(set(found.costs.tolist())) > 1
    assert np.flatnonzero(found.pareto()).tolist() == [3] and found.errors[3] == 0


def test_a_coin_that_differs_by_rounding_is_no_better() -> None:
    for share in (0.1, 0.3, 0.7):
        found = against_coin(np.ones(7), np.zeros(7), np.ones(7), Costs(1, 5, sunk=False), share)
        assert found == (0, 0, 0) and not found.excludes_zero


def test_what_is_sunk_is_paid() -> None:
    """All that go to the dear model have cost the cheap call, too: here nothing is left below 5."""
    cheap, dear = np.repeat([1.0, 0.0], [90, 10]), np.zeros(100)
    found = frontier(cheap, dear, cheap, Costs())
    assert found.costs.tolist() == [6.0, 5.5, 1.0] and not found.dominating(0.9, 0.0, Costs()).any()
    free = frontier(cheap, dear, cheap, Costs(sunk=False))
    assert free.dominating(0.9, 0.0, Costs(sunk=False)).tolist() == [False, True, False]


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one length"):
        frontier([1.0], [1.0, 2.0], [0.5], Costs())


def test_a_share_said_beforehand_against_a_coin() -> None:
    """By hand; equal scores at the edge are handed on in part."""
    cheap, dear, scores = np.array([1.0, 1, 0, 0]), np.zeros(4), np.array([0.9, 0.9, 0.1, 0.2])
    costs = Costs(1.0, 5.0, sunk=True)
    # A quarter handed on costs 1 + 5/4, for which the coin hands on (5/4) / 4 = 0.3125 of the items.
    found = against_coin(cheap, dear, scores, costs, 0.25)
    assert found.point == pytest.approx((0.5 - 0.25) - (0.5 - 0.3125 * 0.5))
    assert found.low <= found.point <= found.high
    half = against_coin(cheap, dear, scores, Costs(1.0, 5.0, sunk=False), 0.5)
    assert half.point == pytest.approx(0 - 0.25)
    assert against_coin(cheap, dear, np.ones(4), Costs(1, 5, sunk=False), 0.5).point == pytest.approx(0)


def test_a_score_that_knows_nothing_beats_no_coin() -> None:
    """Of 200 of them, 5 % have an interval on one side of 0 by chance: here at most twice as many."""
    rng = np.random.default_rng(0)
    costs, beyond = Costs(1.0, 5.0, sunk=False), 0
    for _ in range(200):
        cheap = (rng.random(300) < 0.4).astype(float)
        dear = (rng.random(300) < 0.3).astype(float)
        found = against_coin(cheap, dear, rng.random(300), costs, 0.25, replicates=400)
        beyond += found.excludes_zero
    assert beyond <= 20
