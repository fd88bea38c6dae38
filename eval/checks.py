"""What the statistics accept: arrays, counts, numbers and names, checked in one place.

Every public function of `eval` passes its input through these. They return what they were given, as an array
or number, or raise ValueError with one line that names the argument, what was expected and what was found.
"""

from __future__ import annotations

import math
import numbers as abstract
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MAX = 1e150  # a sum of squares of a million such numbers is still a number
MOST_COUNTED = 2**30
# Shares of the largest number up to which a difference is rounding: of numbers that were read, and of numbers
# that were computed, as differences are from larger ones.
READ, COMPUTED = 4 * float(np.finfo(float).eps), 1e-12


# --- Arrays ----------------------------------------------------------------------------------


def array(given: ArrayLike, name: str) -> NDArray:
    """As an array. Rows of unequal length are refused, and so is a mask, which would be lost."""
    parts = given if isinstance(given, list | tuple) else [given]
    if any(np.ma.isMaskedArray(part) for part in parts):
        raise ValueError(f"{name}: expected an array without a mask, found a masked one")
    try:
        return np.asarray(given)
    except ValueError:
        raise ValueError(f"{name}: expected an array, found rows of unequal length") from None


def labels(given: ArrayLike, *, both: bool = False, name: str = "labels") -> NDArray[np.bool_]:
    """Labels `[items]`, 0 or 1 (or booleans), at least one item.

    Args:
        both: whether both classes must occur.
    """
    found = array(given, name)
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
    found = array(given, name)
    if found.ndim != 2 or found.shape[1] != items or not items:
        raise ValueError(f"{name}: expected shape (rows, {items}), found {found.shape}")
    wrong = ~_is_binary(found)
    if wrong.any():
        raise ValueError(f"{name}: expected 0 or 1 everywhere, found {int(wrong.sum())} otherwise")
    return found.astype(bool)


def numbers(given: ArrayLike, name: str) -> Floats:
    """Numbers of any shape; NaN and infinities are left."""
    found: Any = array(given, name)
    try:
        if found.dtype.kind not in "biufO" or any(isinstance(one, str | bytes) for one in found.flat
                                                  if found.dtype == object):
            raise TypeError
        return found.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected numbers in an array, found something else") from None


def scores(given: ArrayLike, items: int | None = None, name: str = "scores") -> Floats:
    """Scores that are only ranked, `[items]`: NaN is refused; infinities are numbers, equal to themselves."""
    found = _items(given, items, name)
    _refuse(np.isnan(found), name, "numbers", "NaN")
    return found


def finite(given: ArrayLike, items: int | None = None, name: str = "values") -> Floats:
    """Values that are added or squared, `[items]`: NaN, infinities and magnitudes above MAX are refused."""
    found = _items(given, items, name)
    _refuse(~(np.abs(found) <= MAX), name, f"finite numbers of at most {MAX:g}", "NaN, infinite or larger")
    return found


def probabilities(given: ArrayLike, items: int | None = None, name: str = "probabilities") -> Floats:
    """Probabilities `[items]`, from 0 to 1."""
    found = scores(given, items, name)
    _refuse((found < 0) | (found > 1), name, "values in [0, 1]", "outside")
    return found


def groups(given: ArrayLike, items: int, name: str = "groups") -> NDArray[np.intp]:
    """Which items belong together, `[items]` of numbers or texts, as numbers from 0; none may be missing."""
    found = array(given, name)
    if found.shape != (items,):
        raise ValueError(f"{name}: expected shape ({items},), found {found.shape}")
    missing = np.array([one is None or one != one for one in found.tolist()], bool)
    _refuse(missing, name, "a group for every item", "missing")
    if found.dtype == object:  # of mixed types, which have no order
        found = found.astype(str)
    return np.unique(found, return_inverse=True)[1]


def weights(given: ArrayLike, items: int, name: str = "weights") -> Floats:
    """How often each item counts, `[items]` or `[rows, items]`: finite and not negative."""
    found = numbers(given, name)
    if found.ndim not in (1, 2) or found.shape[-1] != items:
        raise ValueError(f"{name}: expected {items} items in the last axis, found shape {found.shape}")
    wrong = ~np.isfinite(found) | (found < 0)
    if wrong.any():
        raise ValueError(f"{name}: expected finite numbers from 0, found {int(wrong.sum())} otherwise")
    return found


def counts(given: ArrayLike, items: int, name: str = "weights") -> Floats:
    """How often each item counts, `[items]` of whole numbers, of which one at least is not 0."""
    found = weights(given, items, name)
    if found.ndim != 1 or (found != np.floor(found)).any():
        raise ValueError(f"{name}: expected [items] of whole numbers, found shape {found.shape} with "
                         f"{int((found != np.floor(found)).sum())} otherwise")
    if not 0 < found.sum() <= MOST_COUNTED:
        raise ValueError(f"{name}: expected a sum from 1 to {MOST_COUNTED:,}, found {found.sum():g}")
    return found


def matrix(given: ArrayLike, rows: int | None = None, columns: int | None = None,
           name: str = "values") -> NDArray:
    """Finite numbers `[rows, columns]`, in the type that they have."""
    found = array(given, name)
    found = found if found.dtype.kind in "biuf" else numbers(found, name)
    wanted = ("rows" if rows is None else rows, "columns" if columns is None else columns)
    if found.ndim != 2 or rows not in (None, len(found)) or columns not in (None, found.shape[1]):
        raise ValueError(f"{name}: expected shape ({wanted[0]}, {wanted[1]}), found {found.shape}")
    wrong: NDArray[np.bool_] = np.any(~(np.abs(found) <= np.float64(MAX)), axis=1)
    if wrong.any():
        raise ValueError(f"{name}: expected finite numbers of at most {MAX:g}, found {_count(wrong, 'row')} "
                         "otherwise")
    return found


def row_numbers(given: ArrayLike, rows: int, name: str) -> NDArray[np.intp]:
    """Some of the numbers of `rows` rows, `[some]`, from 0."""
    found = array(given, name)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected row numbers, found shape {found.shape} of {found.dtype}")
    wrong = (found < 0) | (found >= rows)
    _refuse(wrong, name, f"row numbers from 0 to {rows - 1}", "outside")
    return found.astype(np.intp)


# --- Numbers ---------------------------------------------------------------------------------


def count(value: object, name: str, least: int = 1, most: int | None = None) -> int:
    """A whole number, as those of replicates, bins and seeds are."""
    whole = isinstance(value, abstract.Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected a whole number {expected}, found {shown(value)}")
    return int(value)  # type: ignore[call-overload]


def seed(value: object) -> int:
    """That of a generator of NumPy or scikit-learn."""
    return count(value, "seed", least=0, most=2**32 - 1)


def number(value: object, name: str, least: float = -math.inf) -> float:
    """A finite number."""
    found = _as_float(value)
    if not (math.isfinite(found) and found >= least):
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, found {shown(value)}")
    return found


def score(value: object, name: str = "score") -> float:
    """A number that is only compared, and may be infinite."""
    found = _as_float(value)
    if math.isnan(found):
        raise ValueError(f"{name}: expected a number, found {shown(value)}")
    return found


def positive(value: object, name: str) -> float:
    """A finite number above 0."""
    found = _as_float(value)
    if not 0 < found < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, found {shown(value)}")
    return found


def share(value: object, name: str, *, whole: bool = False) -> float:
    """A number above 0 and below 1, or at most 1 where it may be the whole."""
    found = _as_float(value)
    if not (0 < found < 1 or (whole and found == 1)):
        expected = "above 0, at most 1" if whole else "between 0 and 1"
        raise ValueError(f"{name}: expected a number {expected}, found {shown(value)}")
    return found


def one_of(value: object, names: Iterable[str], name: str) -> None:
    """A name among others."""
    names = list(names)
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names) or 'none'}, found {shown(value)}")


def shown(value: object) -> str:
    """A value in an error: one line, and not too long a one."""
    return " ".join(repr(value).split())[:60]


def _as_float(value: object) -> float:
    """NaN of what is no number."""
    if isinstance(value, bool) or not isinstance(value, abstract.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


# --- Of arrays that were checked -------------------------------------------------------------


def varies(values: Floats, share: float = COMPUTED) -> bool:
    """Whether numbers differ by more than rounding: by more than a share of the largest of them."""
    return bool(np.ptp(values) > share * np.abs(values).max())


def starts_of_ties(ordered: Floats) -> NDArray[np.intp]:
    """Where in scores in order, `[items]`, each group of equal ones starts.

    By comparison, not by difference: ∞ − ∞ is NaN.
    """
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _items(given: ArrayLike, items: int | None, name: str) -> Floats:
    found = numbers(given, name)
    if found.ndim != 1 or (items is not None and len(found) != items):
        expected = "[items]" if items is None else f"shape ({items},) as labels"
        raise ValueError(f"{name}: expected {expected}, found shape {found.shape}")
    return found


def _is_binary(found: NDArray) -> NDArray[np.bool_]:
    if found.dtype.kind not in "biufO":
        return np.zeros(found.shape, bool)
    return np.asarray((found == 0) | (found == 1), bool)


def _refuse(wrong: NDArray[np.bool_], name: str, expected: str, kind: str) -> None:
    if wrong.any():
        raise ValueError(f"{name}: expected {expected}, found {_count(wrong)} {kind}")


def _count(wrong: NDArray[np.bool_], kind: str = "item") -> str:
    return f"{int(wrong.sum())} of {len(wrong)} (the first is {kind} {int(np.flatnonzero(wrong)[0])})"
