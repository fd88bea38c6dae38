"""Folds keep apart what they must."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import TimeSeriesSplit
from tilelli_jax.eval import folds


def test_groups_stay_together() -> None:
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 2, 300), rng.integers(0, 40, 300)
    made = folds.stratified(labels, groups=groups)
    assert len(made) == 5
    for fit, held in made:
        assert not set(groups[fit]) & set(groups[held])
        assert 0.3 < labels[held].mean() < 0.7
    np.testing.assert_array_equal(np.sort(np.concatenate([held for _, held in made])), np.arange(300))


def test_windows_end_before_those_held_out_begin() -> None:
    starts = np.arange(0, 24 * 480, 24)
    for fit, held in folds.forward(starts, starts + 608):
        assert len(fit) and starts[fit].max() + 608 <= starts[held].min()
    apart = folds.forward(starts, starts + 24)
    for (fit, held), (theirs, out) in zip(apart, TimeSeriesSplit(5).split(starts), strict=True):
        np.testing.assert_array_equal(fit, theirs)
        np.testing.assert_array_equal(held, out)
    with pytest.raises(ValueError, match="starts: expected windows in order"):
        folds.forward([3, 1], [4, 2])


@pytest.mark.parametrize(("labels", "expected"), [
    (np.repeat([0, 1], 50), 5), (np.repeat([0, 1], [96, 4]), 3), (np.repeat([0, 1], [99, 1]), 2),
    (np.repeat([0, 1], 15), 3)])
def test_how_many(labels: np.ndarray, expected: int) -> None:
    assert folds.number_of_folds(labels) == expected


def test_folds_of_one_class_are_of_no_use() -> None:
    labels = np.array([0, 0, 0, 1, 0, 1])
    everything = [(np.array([0, 1, 2]), np.array([3, 4])), (np.array([0, 3]), np.array([1, 5])),
                  (np.array([0, 3]), np.array([1, 2]))]
    assert [held.tolist() for _, held in folds.usable(everything, labels)] == [[1, 5]]
