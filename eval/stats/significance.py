"""Significance tests of differences, and Holm's correction for several tests.

Functions that resample take a seed and create their own generator (PCG64), as in `resampling`. Arguments are
those of `metrics`. Invalid input raises ValueError (`checks`).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from .. import checks
from ..checks import Floats
from ..metrics import auroc, midranks
from .resampling import BLOCK, Interval, resampled_counts, runs_of

# --- Tests of a difference between two AUROCs ------------------------------------------------


class PermutationTest(NamedTuple):
    """Permutation test of the difference between two AUROCs.

    Attributes:
        p_one_sided: p in the direction of the observed difference.
        null: differences under permuted labels, `[permutations]`.
    """

    auroc_a: float
    auroc_b: float
    difference: float
    p_one_sided: float
    p_two_sided: float
    null: Floats


def permute_labels(labels: ArrayLike, a: ArrayLike, b: ArrayLike, *, permutations: int = 10_000,
                   seed: int = 42, count_observed: bool = True) -> PermutationTest:
    """Permutes the labels. Null hypothesis: both scores are independent of the labels.

    This null is stronger than equal AUROCs, which `delong` tests.

    Args:
        count_observed: count the observed labels as one of the permutations, so that p is never 0
            (Phipson & Smyth 2010).
    """
    positive = checks.labels(labels, both=True)
    a, b = (checks.scores(score, len(positive), name) for name, score in (("a", a), ("b", b)))
    permutations = checks.count(permutations, "permutations")
    rng = np.random.default_rng(checks.seed(seed))
    # Differences of doubled rank sums are integers, so ties are exact. Those of AUROCs are rounded.
    gains = 2 * (midranks(a) - midranks(b))
    rows = max(1, BLOCK // len(positive))
    null = np.concatenate([
        np.stack([rng.permutation(positive) for _ in range(min(rows, permutations - start))]) @ gains
        for start in range(0, permutations, rows)])
    observed, extra = float(positive @ gains), int(count_observed)

    def p_value(extreme: NDArray[np.bool_]) -> float:
        return float((extreme.sum() + extra) / (permutations + extra))
    scale = 2.0 * float(positive.sum() * (~positive).sum())  # the gain that an AUROC of 1 has over one of 0
    return PermutationTest(auroc(positive, a), auroc(positive, b), observed / scale,
                           p_value(null <= observed if observed < 0 else null >= observed),
                           p_value(np.abs(null) >= abs(observed)), null / scale)


class DeLong(NamedTuple):
    """Two AUROCs, their difference with its interval, and the two-sided p of equal AUROCs."""

    auroc_a: float
    auroc_b: float
    difference: Interval
    p: float


def delong(labels: ArrayLike, a: ArrayLike, b: ArrayLike, level: float = 0.95) -> DeLong:
    """Paired test of equal AUROCs (DeLong et al. 1988; computed from midranks, Sun & Xu 2014).

    The test assumes a normal difference, which holds for large samples. p is 1 if both scores order all items
    alike. p and the ends of the interval are NaN if the variance cannot be estimated: a class has fewer than
    two items, or the estimate is 0 although the scores differ, for example when both separate the classes
    perfectly.
    """
    positive = checks.labels(labels, both=True)
    a, b = (checks.scores(score, len(positive), name) for name, score in (("a", a), ("b", b)))
    checks.fraction(level, "level")
    won_by_positive, won_by_negative = _won(positive, np.stack([a, b]))
    m, n = won_by_positive.shape[1], won_by_negative.shape[1]
    areas = won_by_positive.mean(axis=1) / n
    observed = float(areas[0] - areas[1])
    same_order = np.array_equal(midranks(a), midranks(b))
    # The variance of item-wise differences: variances that cancel would leave rounding errors.
    error = math.sqrt(_variance((won_by_positive[0] - won_by_positive[1]) / n) / m
                      + _variance((won_by_negative[0] - won_by_negative[1]) / m) / n)
    if error == 0 and not same_order:
        error = math.nan
    half_width = error * float(special.ndtri((1 + level) / 2))
    p = 1.0 if error == 0 else float(2 * special.ndtr(-abs(observed) / error))
    interval = Interval(observed, observed - half_width, observed + half_width)
    return DeLong(float(areas[0]), float(areas[1]), interval, p)


def delong_covariance(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """Returns AUROCs `[scores]` and their covariance `[scores, scores]`; NaN if a class has one item only.

    Args:
        scores: `[scores, items]`.
    """
    positive = checks.labels(labels, both=True)
    scores = runs_of(scores, len(positive), "scores")
    won_by_positive, won_by_negative = _won(positive, scores)
    m, n = won_by_positive.shape[1], won_by_negative.shape[1]
    v10, v01 = won_by_positive / n, won_by_negative / m
    if m < 2 or n < 2:
        return v10.mean(axis=1), np.full((len(scores), len(scores)), np.nan)
    return v10.mean(axis=1), np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n


def _won(positive: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    """Counts, for each 1, the 0s below it, and for each 0, the 1s above it; ties count half.

    Returns:
        Two arrays `[scores, items of the class]`.
    """
    won_by_positive, won_by_negative = [], []
    for score in scores:
        ranks = midranks(score)
        won_by_positive.append(ranks[positive] - midranks(score[positive]))
        won_by_negative.append(positive.sum() - (ranks[~positive] - midranks(score[~positive])))
    return np.stack(won_by_positive), np.stack(won_by_negative)


def _variance(values: Floats, tolerance: float = checks.INPUT_TOLERANCE) -> float:
    """Returns the variance of values `[n]`: 0 if they differ only by rounding, NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(values.var(ddof=1)) if checks.varies(values, tolerance) else 0.0


# --- Tests of a difference between two training methods with a few runs each --------------------


class MeanDifference(NamedTuple):
    """A difference of two means with its interval, the degrees of freedom of t, and the two-sided p-value."""

    difference: Interval
    degrees_of_freedom: float
    p: float


def welch(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> MeanDifference:
    """Tests the mean of runs `a` `[n]` minus that of runs `b` `[m]`, with unequal variances (Welch 1947).

    Everything but the point is NaN if the variance cannot be estimated: either side has fewer than two runs,
    or the runs of each side differ only by rounding. p is 1 if all runs are equal.
    """
    a, b = _check_runs(a, b)
    observed = float(a.mean() - b.mean())
    variance_a, variance_b = (_variance(runs) / len(runs) for runs in (a, b))
    total = variance_a + variance_b
    if math.isnan(total):
        return _student(observed, math.nan, math.nan, level)
    if total == 0:
        all_equal = not checks.varies(np.concatenate([a, b]), checks.INPUT_TOLERANCE)
        return _student(observed, 0.0, math.nan, level, all_equal=all_equal)
    # Squares of fractions of the total stay in range where squares of the variances would not.
    freedom = 1 / ((variance_a / total) ** 2 / (len(a) - 1) + (variance_b / total) ** 2 / (len(b) - 1))
    return _student(observed, math.sqrt(total), freedom, level)


def paired_t(differences: ArrayLike, level: float = 0.95) -> MeanDifference:
    """Tests the mean of differences `[pairs]` with Student's t; for differences without spread see `welch`.

    Differences within 1e-12 of the largest count as equal up to rounding. This assumes that the numbers that
    were subtracted are at most a few hundred times as large as the differences.
    """
    differences = checks.finite(differences, name="differences")
    if not len(differences):
        raise ValueError("differences: expected at least one, found none")
    n, observed = len(differences), float(np.mean(differences))
    error = math.sqrt(_variance(differences, checks.COMPUTED_TOLERANCE) / n)
    return _student(observed, error, math.nan if n < 2 else n - 1, level, all_equal=not differences.any())


def _student(observed: float, error: float, freedom: float, level: float, *,
             all_equal: bool = False) -> MeanDifference:
    checks.fraction(level, "level")
    if error == 0:
        return MeanDifference(Interval(observed, math.nan, math.nan), freedom, 1.0 if all_equal else math.nan)
    half_width = error * float(special.stdtrit(freedom, (1 + level) / 2))
    p = float(2 * special.stdtr(freedom, -abs(observed) / error))
    return MeanDifference(Interval(observed, observed - half_width, observed + half_width), freedom, p)


def _check_runs(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    a, b = checks.finite(a, name="a"), checks.finite(b, name="b")
    if not len(a) or not len(b):
        raise ValueError(f"runs: expected at least one of each, found {len(a)} and {len(b)}")
    return a, b


class ExactTest(NamedTuple):
    """A permutation test over all arrangements of the runs.

    Attributes:
        p: two-sided: fraction of arrangements, including the observed one, with an absolute difference at
            least as large as the observed one.
        min_p: smallest p that is possible with this number of runs, whatever their values.
        arrangements: number of arrangements.
    """

    p: float
    min_p: float
    arrangements: int


def min_p_of_relabelling(n: int, m: int) -> float:
    """Returns the smallest p of `exact_relabelling` with n and m runs, whatever their values."""
    return (2 if n == m else 1) / math.comb(n + m, n)


MAX_ARRANGEMENTS = 2**20
# An arrangement counts as being as large as the observed one if it is smaller by at most this fraction of the
# largest number.
ROUNDING = 1e-13


def exact_relabelling(a: ArrayLike, b: ArrayLike) -> ExactTest:
    """Tests the difference between the means of runs `a` `[n]` and `b` `[m]` over all relabellings.

    The null hypothesis is that all runs come from one distribution (Fisher 1935, Pitman 1937).

    Raises:
        ValueError: a side has no run, a run is not finite, or there are more than MAX_ARRANGEMENTS
            relabellings.
    """
    a, b = _check_runs(a, b)
    n, pooled = len(a), np.concatenate([a, b])
    count = _check_arrangements(math.comb(len(pooled), n))
    # If n + m numbers have mean 0, the difference of means is a multiple of the sum of the first n.
    centred = pooled - pooled.mean()
    centred -= centred.mean()  # the mean of large numbers is rounded; this removes the remainder
    subsets = np.fromiter(itertools.chain.from_iterable(itertools.combinations(range(len(pooled)), n)),
                          np.intp, count * n).reshape(count, n)
    # Rounding of the sums, and of the runs themselves.
    tolerance = ROUNDING * np.abs(centred).max() + n * np.spacing(np.abs(pooled).max())
    return ExactTest(_two_sided_p(centred[subsets].sum(axis=1), centred[:n].sum(), tolerance),
                     min_p_of_relabelling(n, len(b)), count)


def exact_sign_flips(differences: ArrayLike) -> ExactTest:
    """Tests the mean of paired differences `[pairs]` over all sign flips.

    The null hypothesis is that the two runs of a pair are exchangeable (Fisher 1935).

    Raises:
        ValueError: there is no difference, one is not finite, or there are more than MAX_ARRANGEMENTS sign
            flips.
    """
    differences = checks.finite(differences, name="differences")
    n = len(differences)
    if not n:
        raise ValueError("differences: expected at least one, found none")
    count = _check_arrangements(2**n)
    signs = 1.0 - 2.0 * (np.arange(count)[:, None] >> np.arange(n) & 1)
    tolerance = ROUNDING * np.abs(differences).max()
    return ExactTest(_two_sided_p(signs @ differences, differences.sum(), tolerance), 2 / count, count)


def _check_arrangements(arrangements: int) -> int:
    if arrangements > MAX_ARRANGEMENTS:
        raise ValueError(f"runs: expected at most {MAX_ARRANGEMENTS:,} arrangements, found {arrangements:,}")
    return arrangements


def _two_sided_p(null: Floats, observed: float, tolerance: float) -> float:
    return float(np.mean(np.abs(null) >= abs(observed) - tolerance))


# --- Several tests at once -------------------------------------------------------------------


def holm(p: ArrayLike) -> Floats:
    """Returns p-values with Holm's step-down correction (1979): `[tests]` → `[tests]`, each at most 1.

    NaN marks an undefined test: it stays NaN and does not count as a test.
    """
    raw = checks.numbers(p, "p")
    if raw.ndim != 1 or ((raw < 0) | (raw > 1)).any():
        raise ValueError("p: expected [tests] of numbers in [0, 1], or NaN for an undefined test, found "
                         f"{checks.short_repr(p)}")
    defined = np.flatnonzero(~np.isnan(raw))
    order = defined[np.argsort(raw[defined], kind="stable")]
    corrected = np.full(raw.shape, np.nan)
    steps = raw[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected


def bootstrap_p(values: ArrayLike, *, replicates: int = 10_000, seed: int = 42,
                groups: ArrayLike | None = None) -> float:
    """Returns the two-sided p of a zero mean: the fraction of resampled centred means that are as extreme.

    See Efron & Tibshirani 1993, 16.4. The observed values count as one replicate. NaN with fewer than two
    values or groups, or if all values, or all group means, are equal up to rounding but the mean is not zero:
    resampling then shows no spread. With few values p is too small.

    Args:
        groups: see `resampled_counts`.
    """
    values = checks.finite(values)
    checks.count(replicates, "replicates")
    checks.seed(seed)
    members = np.arange(len(values)) if groups is None else checks.groups(groups, len(values))
    sizes = np.bincount(members)
    if len(sizes) < 2:
        return math.nan
    observed, centred = abs(float(values.mean())), values - values.mean()
    tolerance = checks.COMPUTED_TOLERANCE * float(np.abs(values).max())
    if np.ptp(np.bincount(members, values) / sizes) <= tolerance:
        return 1.0 if observed <= tolerance else math.nan
    extreme, total = 1, 1
    for counts in resampled_counts(len(values), replicates, seed, groups):
        means = counts @ centred / counts.sum(axis=1)
        extreme, total = extreme + int((np.abs(means) >= observed - tolerance).sum()), total + len(means)
    return extreme / total
