"""Splits of the training rows for cross-validation: pairs of index arrays (fit, held out).

Rows that belong together (questions on one paragraph, windows that overlap) must not lie on both
sides: a probe would be chosen for knowing its neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold, TimeSeriesSplit

from . import checks

Indices = NDArray[np.intp]
Folds = list[tuple[Indices, Indices]]


def stratified(labels: ArrayLike, k: int = 5, *, seed: int = 42, groups: ArrayLike | None = None) -> Folds:
    """Shuffled folds with the classes' shares kept, and whole groups where `groups` `[rows]` are given."""
    known = checks.labels(labels)
    checks.count(k, "k", least=2, most=max(2, len(known)))
    checks.seed(seed)
    most = max(int(known.sum()), int((~known).sum()))
    if most < k:
        raise ValueError(f"labels: expected as many of a class as there are folds, {k}, found {most}")
    if groups is None:
        return list(StratifiedKFold(k, shuffle=True, random_state=seed).split(known, known))
    members = checks.groups(groups, len(known))
    if members.max() + 1 < k:
        raise ValueError(f"groups: expected as many as there are folds, {k}, found {members.max() + 1}")
    return list(StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(known, known, members))


def shuffled(rows: int, k: int = 5, *, seed: int = 42) -> Folds:
    """Shuffled folds that look at nothing."""
    checks.count(k, "k", least=2)
    checks.count(rows, "rows", least=k)
    checks.seed(seed)
    return list(KFold(k, shuffle=True, random_state=seed).split(np.zeros(rows)))


def forward(starts: ArrayLike, ends: ArrayLike, k: int = 5) -> Folds:
    """Folds in time: each is held out from windows that have ended before its first one starts.

    Without overlap they are those of scikit-learn's TimeSeriesSplit.

    Args:
        starts, ends: `[rows]`, of each window's half-open span; starts rise.
    """
    begun = checks.finite(starts, name="starts")
    ended = checks.finite(ends, len(begun), "ends")
    if (np.diff(begun) < 0).any():
        raise ValueError("starts: expected windows in order of time, found one that starts before the last")
    if (ended < begun).any():
        raise ValueError("ends: expected none before its start, found one")
    checks.count(k, "k", least=2, most=max(2, len(begun) - 1))
    if len(begun) <= k:
        raise ValueError(f"starts: expected more windows than folds, {k}, found {len(begun)}")
    return [(fit[ended[fit] <= begun[held[0]]], held)
            for fit, held in TimeSeriesSplit(k).split(begun)]


def number_of_folds(labels: ArrayLike, most: int = 5, rows_for_one: int = 10) -> int:
    """As many as the rows bear: at least 2, fewer than the rarer class has rows, `rows_for_one` rows each."""
    known = checks.labels(labels)
    checks.count(most, "most", least=2)
    checks.count(rows_for_one, "rows_for_one")
    rarer = int(min(known.sum(), (~known).sum()))
    return max(2, min(most, rarer - 1, len(known) // rows_for_one))


def usable(folds: Folds, labels: ArrayLike) -> Folds:
    """Those that have both classes to fit and both to be compared with."""
    known = checks.labels(labels)
    return [(fit, held) for fit, held in checked(folds, len(known))
            if all(len(np.unique(known[part])) == 2 for part in (fit, held))]


def checked(folds: Folds, rows: int) -> Folds:
    """Folds of so many rows. Raises ValueError for what are not pairs of row numbers."""
    pairs = [tuple(fold) if isinstance(fold, list | tuple) else () for fold in folds]
    if wrong := [number for number, pair in enumerate(pairs) if len(pair) != 2]:
        raise ValueError(f"folds: expected pairs (fit, held out), found another thing as fold {wrong[0]}")
    return [(checks.row_numbers(fit, rows, "folds"), checks.row_numbers(held, rows, "folds"))
            for fit, held in pairs]
