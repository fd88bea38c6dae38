"""Folds do not split groups, respect time, and have both classes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import TimeSeriesSplit

from tilelli_jax.eval import folds


def test_groups_stay_together() -> None:
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 2, 300), rng.integers(0, 40, 300)
    splits = folds.stratified(labels, groups=groups)
    assert len(splits) == 5
    for fit, held_out in splits:
        assert not set(groups[fit]) & set(groups[held_out])
        assert 0.3 < labels[held_out].mean() < 0.7
    rows = np.concatenate([held_out for _, held_out in splits])
    np.testing.assert_array_equal(np.sort(rows), np.arange(300))


def test_fitted_windows_end_before_held_out_ones_start() -> None:
    starts = np.arange(0, 24 * 480, 24)
    for fit, held_out in folds.forward(starts, starts + 608):
        assert len(fit) and starts[fit].max() + 608 <= starts[held_out].min()
    without_overlap = folds.forward(starts, starts + 24)
    for ours, theirs in zip(without_overlap, TimeSeriesSplit(5).split(starts), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])
    with pytest.raises(ValueError, match="starts: expected windows in order"):
        folds.forward([3, 1], [4, 2])


@pytest.mark.parametrize(("labels", "expected"), [
    (np.repeat([0, 1], 50), 5), (np.repeat([0, 1], [96, 4]), 3), (np.repeat([0, 1], [99, 1]), 2),
    (np.repeat([0, 1], 15), 3)])
def test_number_of_folds(labels: np.ndarray, expected: int) -> None:
    assert folds.number_of_folds(labels) == expected


def test_folds_with_one_class_are_dropped() -> None:
    labels = np.array([0, 0, 0, 1, 0, 1])
    all_folds = [(np.array([0, 1, 2]), np.array([3, 4])), (np.array([0, 3]), np.array([1, 5])),
                 (np.array([0, 3]), np.array([1, 2]))]
    assert [held_out.tolist() for _, held_out in folds.usable(all_folds, labels)] == [[1, 5]]
