"""Splits of the training rows for cross-validation: pairs of index arrays (fit, held out).

Rows that belong together (questions on one paragraph, overlapping windows) must stay on one side of a split.
Otherwise cross-validation would select a probe for memorising related rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold, TimeSeriesSplit

from . import checks

Indices = NDArray[np.intp]
Folds = list[tuple[Indices, Indices]]


def stratified(labels: ArrayLike, k: int = 5, *, seed: int = 42, groups: ArrayLike | None = None) -> Folds:
    """Returns k shuffled folds that preserve the class frequencies.

    Args:
        groups: `[rows]`, group of each row; groups are never split. None lets every row move alone.
    """
    positive = checks.labels(labels)
    checks.count(k, "k", min=2, max=max(2, len(positive)))
    checks.seed(seed)
    larger_class = max(int(positive.sum()), int((~positive).sum()))
    if larger_class < k:
        raise ValueError(f"labels: expected a class with at least {k} rows (the number of folds), found "
                         f"{larger_class}")
    if groups is None:
        return list(StratifiedKFold(k, shuffle=True, random_state=seed).split(positive, positive))
    members = checks.groups(groups, len(positive))
    if members.max() + 1 < k:
        raise ValueError(f"groups: expected at least {k} (the number of folds), found {members.max() + 1}")
    return list(StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(positive, positive, members))


def shuffled(rows: int, k: int = 5, *, seed: int = 42) -> Folds:
    """Returns k shuffled folds that ignore labels and groups."""
    checks.count(k, "k", min=2)
    checks.count(rows, "rows", min=k)
    checks.seed(seed)
    return list(KFold(k, shuffle=True, random_state=seed).split(np.zeros(rows)))


def forward(starts: ArrayLike, ends: ArrayLike, k: int = 5) -> Folds:
    """Returns k folds in time: each probe is fitted on windows that end before the held-out ones start.

    Without overlap the folds equal those of scikit-learn's TimeSeriesSplit.

    Args:
        starts, ends: `[rows]`, half-open span of each window, in order of start.
    """
    start = checks.finite(starts, name="starts")
    end = checks.finite(ends, len(start), "ends")
    if (np.diff(start) < 0).any():
        raise ValueError("starts: expected windows in order of time, found one that starts before the last")
    if (end < start).any():
        raise ValueError("ends: expected each at or after its start, found one before")
    checks.count(k, "k", min=2, max=max(2, len(start) - 1))
    if len(start) <= k:
        raise ValueError(f"starts: expected more windows than folds, {k}, found {len(start)}")
    return [(fit[end[fit] <= start[held_out[0]]], held_out)
            for fit, held_out in TimeSeriesSplit(k).split(start)]


def number_of_folds(labels: ArrayLike, max_folds: int = 5, min_rows_per_fold: int = 10) -> int:
    """Returns the maximum number of folds that the rows support, from 2 to `max_folds`.

    There are fewer folds than rows of the rarer class, and at least `min_rows_per_fold` rows per fold. The
    result is 2 even where the rows are too few for that.
    """
    positive = checks.labels(labels)
    checks.count(max_folds, "max_folds", min=2)
    checks.count(min_rows_per_fold, "min_rows_per_fold")
    rarer_class = int(min(positive.sum(), (~positive).sum()))
    return max(2, min(max_folds, rarer_class - 1, len(positive) // min_rows_per_fold))


def usable(folds: Folds, labels: ArrayLike) -> Folds:
    """Returns the folds with both classes among the rows to fit and among the held-out rows."""
    positive = checks.labels(labels)
    return [(fit, held_out) for fit, held_out in check_folds(folds, len(positive))
            if all(len(np.unique(positive[part])) == 2 for part in (fit, held_out))]


def check_folds(folds: Folds, rows: int) -> Folds:
    """Returns folds of this number of rows. Raises ValueError unless they are pairs of row-number arrays."""
    pairs = [tuple(fold) if isinstance(fold, list | tuple) else () for fold in folds]
    if wrong := [number for number, pair in enumerate(pairs) if len(pair) != 2]:
        raise ValueError(f"folds: expected pairs (fit, held out), found something else as fold {wrong[0]}")
    return [(checks.row_numbers(fit, rows, "folds"), checks.row_numbers(held_out, rows, "folds"))
            for fit, held_out in pairs]
