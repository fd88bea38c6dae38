"""Input checks of the statistics: arrays, counts, numbers and names.

Every public function of `eval` passes its input through these checks. Each returns its input as an array or
number, or raises ValueError with one line that names the argument, the expected value and the value found.
"""

from __future__ import annotations

import math
import numbers as abstract
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MAX = 1e150  # the sum of squares of a million numbers of this size is still finite
MAX_TOTAL_COUNT = 2**30
# Differences up to this fraction of the largest number count as rounding: between numbers that were read,
# and between numbers that were computed, such as differences of larger numbers.
INPUT_TOLERANCE, COMPUTED_TOLERANCE = 4 * float(np.finfo(float).eps), 1e-12


# --- Arrays ----------------------------------------------------------------------------------


def array(values: ArrayLike, name: str) -> NDArray:
    """Returns an array. Rejects rows of unequal length, and masked arrays, whose mask would be lost."""
    parts = values if isinstance(values, list | tuple) else [values]
    if any(np.ma.isMaskedArray(part) for part in parts):
        raise ValueError(f"{name}: expected an array without a mask, found a masked one")
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{name}: expected an array, found rows of unequal length") from None


def labels(values: ArrayLike, *, both: bool = False, name: str = "labels") -> NDArray[np.bool_]:
    """Returns labels `[items]`: 0 or 1 (or booleans), of at least one item.

    Args:
        both: require both classes.
    """
    checked = array(values, name)
    if checked.ndim != 1 or not len(checked):
        raise ValueError(f"{name}: expected [items] with at least one, found shape {checked.shape}")
    wrong = ~_is_binary(checked)
    if wrong.any():
        raise ValueError(f"{name}: expected 0 or 1 for every item, found other values for {_count(wrong)}")
    if both and (checked == checked[0]).all():
        raise ValueError(f"{name}: expected both classes, found one")
    return checked.astype(bool)


def numbers(values: ArrayLike, name: str) -> Floats:
    """Returns numbers of any shape, possibly NaN or infinite."""
    checked: Any = array(values, name)
    try:
        if checked.dtype.kind not in "biufO" or any(isinstance(value, str | bytes) for value in checked.flat
                                                    if checked.dtype == object):
            raise TypeError
        return checked.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected an array of numbers, found other values") from None


def scores(values: ArrayLike, items: int | None = None, name: str = "scores") -> Floats:
    """Returns scores `[items]` of which only the order matters. Rejects NaN; equal infinities are ties."""
    checked = _items(values, items, name)
    _raise(np.isnan(checked), name, "numbers", "NaN")
    return checked


def finite(values: ArrayLike, items: int | None = None, name: str = "values") -> Floats:
    """Returns values `[items]` to be added or squared. Rejects NaN, infinities and magnitudes above MAX."""
    checked = _items(values, items, name)
    _raise(~(np.abs(checked) <= MAX), name, f"finite numbers of at most {MAX:g}",
            "NaN, infinite or larger values")
    return checked


def probabilities(values: ArrayLike, items: int | None = None, name: str = "probabilities") -> Floats:
    """Returns probabilities `[items]` in [0, 1]."""
    checked = scores(values, items, name)
    _raise((checked < 0) | (checked > 1), name, "values in [0, 1]", "values outside")
    return checked


def groups(values: ArrayLike, items: int, name: str = "groups") -> NDArray[np.intp]:
    """Returns the group of each item, `[items]`, as numbers from 0. Takes numbers or texts, none missing."""
    checked = array(values, name)
    if checked.shape != (items,):
        raise ValueError(f"{name}: expected shape ({items},), found {checked.shape}")
    missing = np.array([value is None or value != value for value in checked.tolist()], bool)
    _raise(missing, name, "a group for every item", "none")
    if checked.dtype == object:  # mixed types have no order
        checked = checked.astype(str)
    return np.unique(checked, return_inverse=True)[1]


def weights(values: ArrayLike, items: int, name: str = "weights") -> Floats:
    """Returns weights `[items]` or `[rows, items]`: finite and non-negative."""
    checked = numbers(values, name)
    if checked.ndim not in (1, 2) or checked.shape[-1] != items:
        raise ValueError(f"{name}: expected {items} items in the last axis, found shape {checked.shape}")
    wrong = ~np.isfinite(checked) | (checked < 0)
    if wrong.any():
        raise ValueError(f"{name}: expected finite numbers ≥ 0, found {int(wrong.sum())} other values")
    return checked


def counts(values: ArrayLike, items: int, name: str = "weights") -> Floats:
    """Returns how often each item counts, `[items]`: integers, at least one of them above 0."""
    checked = weights(values, items, name)
    if checked.ndim != 1 or (checked != np.floor(checked)).any():
        raise ValueError(f"{name}: expected [items] of integers, found shape {checked.shape} with "
                         f"{int((checked != np.floor(checked)).sum())} fractions")
    if not 0 < checked.sum() <= MAX_TOTAL_COUNT:
        raise ValueError(f"{name}: expected a sum from 1 to {MAX_TOTAL_COUNT:,}, found {checked.sum():g}")
    return checked


def matrix(values: ArrayLike, rows: int | None = None, columns: int | None = None,
           name: str = "values") -> NDArray:
    """Returns finite numbers `[rows, columns]`, dtype unchanged. None accepts any row or column count."""
    checked = array(values, name)
    checked = checked if checked.dtype.kind in "biuf" else numbers(checked, name)
    expected = ("rows" if rows is None else rows, "columns" if columns is None else columns)
    if checked.ndim != 2 or rows not in (None, len(checked)) or columns not in (None, checked.shape[1]):
        raise ValueError(f"{name}: expected shape ({expected[0]}, {expected[1]}), found {checked.shape}")
    wrong: NDArray[np.bool_] = np.any(~(np.abs(checked) <= np.float64(MAX)), axis=1)
    if wrong.any():
        raise ValueError(f"{name}: expected finite numbers of at most {MAX:g}, found other values in "
                         f"{_count(wrong, 'row')}")
    return checked


def row_numbers(values: ArrayLike, rows: int, name: str) -> NDArray[np.intp]:
    """Returns row numbers, each from 0 to `rows` − 1."""
    checked = array(values, name)
    if checked.ndim != 1 or (checked.size and checked.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected row numbers, found shape {checked.shape} of {checked.dtype}")
    wrong = (checked < 0) | (checked >= rows)
    _raise(wrong, name, f"row numbers from 0 to {rows - 1}", "values outside")
    return checked.astype(np.intp)


# --- Single values ---------------------------------------------------------------------------


def count(value: object, name: str, min: int = 1, max: int | None = None) -> int:
    """Returns an integer from `min` to `max`, such as a number of replicates or bins."""
    is_whole = isinstance(value, abstract.Integral) and not isinstance(value, bool)
    if not is_whole or value < min or (max is not None and value > max):  # type: ignore[operator]
        expected = f"of at least {min}" if max is None else f"from {min} to {max}"
        raise ValueError(f"{name}: expected an integer {expected}, found {short_repr(value)}")
    return int(value)  # type: ignore[call-overload]


def seed(value: object) -> int:
    """Returns a seed that the generators of NumPy and scikit-learn accept."""
    return count(value, "seed", min=0, max=2**32 - 1)


def number(value: object, name: str, min: float = -math.inf) -> float:
    """Returns a finite number of at least `min`."""
    checked = _as_float(value)
    if not (math.isfinite(checked) and checked >= min):
        bound = "" if min == -math.inf else f" of at least {min:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, found {short_repr(value)}")
    return checked


def score(value: object, name: str = "score") -> float:
    """Returns a number, possibly infinite, that is only compared with others."""
    checked = _as_float(value)
    if math.isnan(checked):
        raise ValueError(f"{name}: expected a number, found {short_repr(value)}")
    return checked


def positive(value: object, name: str) -> float:
    """Returns a finite number above 0."""
    checked = _as_float(value)
    if not 0 < checked < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, found {short_repr(value)}")
    return checked


def fraction(value: object, name: str, *, allow_one: bool = False) -> float:
    """Returns a number above 0 and below 1, or also 1 with `allow_one`."""
    checked = _as_float(value)
    if not (0 < checked < 1 or (allow_one and checked == 1)):
        expected = "above 0, at most 1" if allow_one else "between 0 and 1"
        raise ValueError(f"{name}: expected a number {expected}, found {short_repr(value)}")
    return checked


def one_of(value: object, names: Iterable[str], name: str) -> None:
    """Requires the value to be one of the names."""
    names = list(names)
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names) or 'none'}, found {short_repr(value)}")


def short_repr(value: object) -> str:
    """Returns a value's repr for an error message: on one line, cut at 60 characters."""
    return " ".join(repr(value).split())[:60]


def _as_float(value: object) -> float:
    """Returns a float, or NaN for a value that is not a number."""
    if isinstance(value, bool) or not isinstance(value, abstract.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


# --- Properties of checked arrays ------------------------------------------------------------


def varies(values: Floats, tolerance: float = COMPUTED_TOLERANCE) -> bool:
    """Returns whether numbers differ by more than rounding: by more than this fraction of the largest."""
    return bool(np.ptp(values) > tolerance * np.abs(values).max())


def starts_of_ties(ordered: Floats) -> NDArray[np.intp]:
    """Returns where each group of equal scores starts among ordered scores `[items]`.

    Compares neighbours rather than their difference: ∞ − ∞ is NaN.
    """
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _items(values: ArrayLike, items: int | None, name: str) -> Floats:
    checked = numbers(values, name)
    if checked.ndim != 1 or (items is not None and len(checked) != items):
        expected = "[items]" if items is None else f"shape ({items},)"
        raise ValueError(f"{name}: expected {expected}, found shape {checked.shape}")
    return checked


def _is_binary(values: NDArray) -> NDArray[np.bool_]:
    if values.dtype.kind not in "biufO":
        return np.zeros(values.shape, bool)
    return np.asarray((values == 0) | (values == 1), bool)


def _raise(wrong: NDArray[np.bool_], name: str, expected: str, actual: str) -> None:
    if wrong.any():
        raise ValueError(f"{name}: expected {expected}, found {actual} for {_count(wrong)}")


def _count(wrong: NDArray[np.bool_], kind: str = "item") -> str:
    return f"{int(wrong.sum())} of {len(wrong)} {kind}s (the first: {kind} {int(np.flatnonzero(wrong)[0])})"
