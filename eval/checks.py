"""What the statistics accept: labels, scores, values, probabilities and groups, checked in one place.

Every public function of `eval` passes its input through these. They return arrays, or raise ValueError with
one line that names the argument, what was expected, and how many items are otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MAX = 1e150  # a sum of squares of a million such numbers is still a number


def labels(given: ArrayLike, *, both: bool = False, name: str = "labels") -> NDArray[np.bool_]:
    """Labels `[items]`, 0 or 1 (or booleans), at least one item.

    Args:
        both: whether both classes must occur.
    """
    found = np.asarray(given)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"{name}: expected [items] with at least one, found shape {found.shape}")
    wrong = ~_is_binary(found)
    if wrong.any():
        raise ValueError(f"{name}: expected 0 or 1 for every item, found {_count(wrong)} otherwise")
    if both and (found == found[0]).all():
        raise ValueError(f"{name}: expected both classes, found one")
    return found.astype(bool)


def label_rows(given: ArrayLike, items: int, name: str = "labels") -> NDArray[np.bool_]:
    """Several labellings of the same items, `[rows, items]`, each 0 or 1."""
    found = np.asarray(given)
    if found.ndim != 2 or found.shape[1] != items or not items:
        raise ValueError(f"{name}: expected shape (rows, {items}), found {found.shape}")
    wrong = ~_is_binary(found)
    if wrong.any():
        raise ValueError(f"{name}: expected 0 or 1 everywhere, found {int(wrong.sum())} otherwise")
    return found.astype(bool)


def scores(given: ArrayLike, items: int | None = None, name: str = "scores") -> Floats:
    """Scores that are only ranked, `[items]`: NaN is refused; infinities are numbers, equal to themselves."""
    found = _numbers(given, items, name)
    _refuse(np.isnan(found), name, "numbers", "NaN")
    return found


def finite(given: ArrayLike, items: int | None = None, name: str = "values") -> Floats:
    """Values that are added or squared, `[items]`: NaN, infinities and magnitudes above MAX are refused."""
    found = _numbers(given, items, name)
    _refuse(~(np.abs(found) <= MAX), name, f"finite numbers of at most {MAX:g}", "NaN, infinite or larger")
    return found


def probabilities(given: ArrayLike, items: int | None = None, name: str = "probabilities") -> Floats:
    """Probabilities `[items]`, from 0 to 1."""
    found = scores(given, items, name)
    _refuse((found < 0) | (found > 1), name, "values in [0, 1]", "outside")
    return found


def groups(given: ArrayLike, items: int, name: str = "groups") -> NDArray[np.intp]:
    """Which items belong together, `[items]` of numbers or texts, as numbers from 0; none may be missing."""
    found = np.asarray(given)
    if found.shape != (items,):
        raise ValueError(f"{name}: expected shape ({items},), found {found.shape}")
    missing = np.array([one is None or one != one for one in found.tolist()], bool)
    _refuse(missing, name, "a group for every item", "missing")
    if found.dtype == object:  # of mixed types, which have no order
        found = found.astype(str)
    return np.unique(found, return_inverse=True)[1]


def weights(given: ArrayLike, items: int, name: str = "weights") -> Floats:
    """How often each item counts, `[items]` or `[rows, items]`: finite and not negative."""
    found = _floats(given, name)
    if found.ndim not in (1, 2) or found.shape[-1] != items:
        raise ValueError(f"{name}: expected {items} items in the last axis, found shape {found.shape}")
    wrong = ~np.isfinite(found) | (found < 0)
    if wrong.any():
        raise ValueError(f"{name}: expected finite numbers from 0, found {int(wrong.sum())} otherwise")
    return found


def share(value: float, name: str) -> float:
    """A number strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, found {value}")
    return float(value)


def starts_of_ties(ordered: Floats) -> NDArray[np.intp]:
    """Where in scores in order, `[items]`, each group of equal ones starts.

    By comparison, not by difference: ∞ − ∞ is NaN.
    """
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _numbers(given: ArrayLike, items: int | None, name: str) -> Floats:
    found = _floats(given, name)
    if found.ndim != 1 or (items is not None and len(found) != items):
        expected = "[items]" if items is None else f"shape ({items},) as labels"
        raise ValueError(f"{name}: expected {expected}, found shape {found.shape}")
    return found


def _floats(given: ArrayLike, name: str) -> Floats:
    try:
        found: Any = np.asarray(given)
        if found.dtype.kind not in "biufO":
            raise TypeError
        return found.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected numbers in an array, found something else") from None


def _is_binary(found: NDArray) -> NDArray[np.bool_]:
    if found.dtype.kind not in "biufO":
        return np.zeros(found.shape, bool)
    return np.asarray((found == 0) | (found == 1), bool)


def _refuse(wrong: NDArray[np.bool_], name: str, expected: str, kind: str) -> None:
    if wrong.any():
        raise ValueError(f"{name}: expected {expected}, found {_count(wrong)} {kind}")


def _count(wrong: NDArray[np.bool_]) -> str:
    return f"{int(wrong.sum())} of {len(wrong)} (the first is item {int(np.flatnonzero(wrong)[0])})"
