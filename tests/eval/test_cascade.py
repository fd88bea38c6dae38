"""The cascade against handing on item by item."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.cascade import Costs, frontier, oracle_frontier

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
