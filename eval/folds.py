"""Splits of the training rows for cross-validation: pairs of index arrays (fit, held out).

Rows that belong together (questions on one paragraph, windows that overlap) must not lie on both
sides: a probe would be chosen for knowing its neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold, TimeSeriesSplit

Indices = NDArray[np.intp]
Folds = list[tuple[Indices, Indices]]


def stratified(labels: ArrayLike, k: int = 5, *, seed: int = 42, groups: ArrayLike | None = None) -> Folds:
    """Shuffled folds with the classes' shares kept, and whole groups where `groups` `[rows]` are given."""
    labels = np.asarray(labels)
    if groups is None:
        return list(StratifiedKFold(k, shuffle=True, random_state=seed).split(labels, labels))
    return list(StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(labels, labels, groups))


def shuffled(rows: int, k: int = 5, *, seed: int = 42) -> Folds:
    """Shuffled folds that look at nothing."""
    return list(KFold(k, shuffle=True, random_state=seed).split(np.zeros(rows)))


def forward(starts: ArrayLike, ends: ArrayLike, k: int = 5) -> Folds:
    """Folds in time: each is held out from windows that have ended before its first one starts.

    Without overlap they are those of scikit-learn's TimeSeriesSplit.

    Args:
        starts, ends: `[rows]`, of each window's half-open span; starts rise.
    """
    starts, ends = np.asarray(starts), np.asarray(ends)
    if (np.diff(starts) < 0).any():
        raise ValueError("starts: expected windows in order of time")
    return [(fit[ends[fit] <= starts[held[0]]], held)
            for fit, held in TimeSeriesSplit(k).split(starts)]


def number_of_folds(labels: ArrayLike, most: int = 5, rows_for_one: int = 10) -> int:
    """As many as the rows bear: at least 2, fewer than the rarer class has rows, `rows_for_one` rows each."""
    labels = np.asarray(labels)
    rarer = int(min(labels.sum(), len(labels) - labels.sum()))
    return max(2, min(most, rarer - 1, len(labels) // rows_for_one))


def usable(folds: Folds, labels: ArrayLike) -> Folds:
    """Those that have both classes to fit and both to be held against."""
    labels = np.asarray(labels)
    return [(fit, held) for fit, held in folds
            if all(len(np.unique(labels[part])) == 2 for part in (fit, held))]
