"""Is a difference one? Permutation tests, DeLong's, Welch's, Student's and exact ones; corrections for many.

Functions that resample take a seed and make their own generator (PCG64), as in `resampling`; their arguments
are those of `metrics`. Input that is not what a function takes raises ValueError (`checks`).
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
    """A difference of two AUROCs beside those of rearranged data.

    `p_one_sided` looks to the side on which the difference lies. `null` is `[permutations]`.
    """

    auroc_a: float
    auroc_b: float
    difference: float
    p_one_sided: float
    p_two_sided: float
    null: Floats


def permute_labels(labels: ArrayLike, a: ArrayLike, b: ArrayLike, *, permutations: int = 10_000,
                   seed: int = 42, count_observed: bool = True) -> PermutationTest:
    """Permutes the labels: the null is that neither score knows anything of them.

    That is more than "equal AUROC", which `delong` tests.

    Args:
        count_observed: whether what was seen counts as one of the permutations, so that p is never 0
            (Phipson & Smyth 2010).
    """
    positive = checks.labels(labels, both=True)
    a, b = (checks.scores(score, len(positive), name) for name, score in (("a", a), ("b", b)))
    permutations = checks.count(permutations, "permutations")
    rng = np.random.default_rng(checks.seed(seed))
    # Differences of doubled rank sums are whole numbers. Equal differences of areas may differ by rounding.
    gains = 2 * (midranks(a) - midranks(b))
    rows = max(1, BLOCK // len(positive))
    null = np.concatenate([
        np.stack([rng.permutation(positive) for _ in range(min(rows, permutations - start))]) @ gains
        for start in range(0, permutations, rows)])
    seen, extra = float(positive @ gains), int(count_observed)

    def share(beyond: NDArray[np.bool_]) -> float:
        return float((beyond.sum() + extra) / (permutations + extra))
    whole = 2.0 * float(positive.sum() * (~positive).sum())  # that of the areas 1 and 0
    return PermutationTest(auroc(positive, a), auroc(positive, b), seen / whole,
                           share(null <= seen if seen < 0 else null >= seen),
                           share(np.abs(null) >= abs(seen)), null / whole)


class DeLong(NamedTuple):
    """Two AUROCs, their difference with its interval, and the two-sided p of "the areas are equal"."""

    auroc_a: float
    auroc_b: float
    difference: Interval
    p: float


def delong(labels: ArrayLike, a: ArrayLike, b: ArrayLike, level: float = 0.95) -> DeLong:
    """The paired test of equal AUROCs (DeLong et al. 1988; by midranks, Sun & Xu 2014).

    The difference is taken to be normal, as it is for large sets. p is 1 where the scores order every
    pair alike. Where no variance can be estimated, p and the ends of the interval are NaN: a class has fewer
    than two items, or the estimate is 0 though the scores differ, as of scores that separate the classes
    perfectly.
    """
    positive = checks.labels(labels, both=True)
    a, b = (checks.scores(score, len(positive), name) for name, score in (("a", a), ("b", b)))
    checks.share(level, "level")
    won_by_positive, won_by_negative = _won(positive, np.stack([a, b]))
    m, n = won_by_positive.shape[1], won_by_negative.shape[1]
    areas = won_by_positive.mean(axis=1) / n
    seen = float(areas[0] - areas[1])
    alike = np.array_equal(midranks(a), midranks(b))
    # Of differences, item by item: of variances that cancel, rounding would be left.
    spread = math.sqrt(_variance((won_by_positive[0] - won_by_positive[1]) / n) / m
                       + _variance((won_by_negative[0] - won_by_negative[1]) / m) / n)
    if spread == 0 and not alike:
        spread = math.nan
    reach = spread * float(special.ndtri((1 + level) / 2))
    p = 1.0 if spread == 0 else float(2 * special.ndtr(-abs(seen) / spread))
    return DeLong(float(areas[0]), float(areas[1]), Interval(seen, seen - reach, seen + reach), p)


def delong_covariance(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """AUROCs `[scores]` and their covariance `[scores, scores]`.

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
    """For each 1 the 0s below it, for each 0 the 1s above it, ties half: `[scores, items of the class]`."""
    won_by_positive, won_by_negative = [], []
    for score in scores:
        ranks = midranks(score)
        won_by_positive.append(ranks[positive] - midranks(score[positive]))
        won_by_negative.append(positive.sum() - (ranks[~positive] - midranks(score[~positive])))
    return np.stack(won_by_positive), np.stack(won_by_negative)


def _variance(values: Floats, rounding: float = checks.READ) -> float:
    """Of `[n]`: 0 where they differ by rounding alone, NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(values.var(ddof=1)) if checks.varies(values, rounding) else 0.0


# --- Tests of a difference between two ways to train, of a few runs each ------------------------


class MeanDifference(NamedTuple):
    """A difference of two means with its interval, the degrees of freedom of t, and the two-sided p."""

    difference: Interval
    freedom: float
    p: float


def welch(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> MeanDifference:
    """The mean of runs `a` `[n]` less that of `b` `[m]`, whose spreads may differ (Welch 1947).

    All is NaN but the point where either has fewer than two runs, or where no run differs from the others of
    its kind by more than rounding: no spread can be estimated then. p is 1 where all are equal.
    """
    a, b = _some_runs(a, b)
    seen = float(a.mean() - b.mean())
    of_a, of_b = (_variance(runs) / len(runs) for runs in (a, b))
    whole = of_a + of_b
    if math.isnan(whole):
        return _student(seen, math.nan, math.nan, level)
    if whole == 0:
        alike = not checks.varies(np.concatenate([a, b]), checks.READ)
        return _student(seen, 0.0, math.nan, level, alike=alike)
    # By shares of the whole, whose squares are numbers even where those of the variances are not.
    freedom = 1 / ((of_a / whole) ** 2 / (len(a) - 1) + (of_b / whole) ** 2 / (len(b) - 1))
    return _student(seen, math.sqrt(whole), freedom, level)


def paired_t(differences: ArrayLike, level: float = 0.95) -> MeanDifference:
    """The mean of differences `[pairs]`, by Student's t; see `welch` for those without spread.

    What the differences are of is taken to be at most a few hundred times as large: a spread of 1e-12 of the
    largest difference is its rounding.
    """
    differences = checks.finite(differences, name="differences")
    if not len(differences):
        raise ValueError("differences: expected one at least, found none")
    n, seen = len(differences), float(np.mean(differences))
    error = math.sqrt(_variance(differences, checks.COMPUTED) / n)
    return _student(seen, error, math.nan if n < 2 else n - 1, level, alike=not differences.any())


def _student(seen: float, error: float, freedom: float, level: float, *,
             alike: bool = False) -> MeanDifference:
    checks.share(level, "level")
    if error == 0:
        return MeanDifference(Interval(seen, math.nan, math.nan), freedom, 1.0 if alike else math.nan)
    reach = error * float(special.stdtrit(freedom, (1 + level) / 2))
    p = float(2 * special.stdtr(freedom, -abs(seen) / error))
    return MeanDifference(Interval(seen, seen - reach, seen + reach), freedom, p)


def _some_runs(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    a, b = checks.finite(a, name="a"), checks.finite(b, name="b")
    if not len(a) or not len(b):
        raise ValueError(f"runs: expected one of each at least, found {len(a)} and {len(b)}")
    return a, b


class ExactTest(NamedTuple):
    """A permutation test that looks at every arrangement.

    Attributes:
        p: two-sided: the share of arrangements, what was seen among them, whose difference is as large.
        least: the smallest that p can be with so many runs, whatever they come to.
        arrangements: how many there are.
    """

    p: float
    least: float
    arrangements: int


MAX_ARRANGEMENTS = 2**20
ROUNDING = 1e-13  # a share of the largest number; an arrangement so little below what was seen is as large


def exact_relabelling(a: ArrayLike, b: ArrayLike) -> ExactTest:
    """Of the difference between the means of runs `a` `[n]` and `b` `[m]`, over all ways to name them so.

    The null is that the runs of both come from one distribution (Fisher 1935, Pitman 1937).

    Raises:
        ValueError: either has no run, one is not finite, or there are more than MOST_ARRANGEMENTS.
    """
    a, b = _some_runs(a, b)
    n, whole = len(a), np.concatenate([a, b])
    count = _few_enough(math.comb(len(whole), n))
    # Of n + m numbers with mean 0, the difference of means is a multiple of the sum of the first n.
    centred = whole - whole.mean()
    centred -= centred.mean()  # the mean of large numbers is rounded: what that leaves
    chosen = np.fromiter(itertools.chain.from_iterable(itertools.combinations(range(len(whole)), n)),
                         np.intp, count * n).reshape(count, n)
    # As near as the sum comes, and as the runs themselves were rounded.
    near = ROUNDING * np.abs(centred).max() + n * np.spacing(np.abs(whole).max())
    return ExactTest(_as_large(centred[chosen].sum(axis=1), centred[:n].sum(), near),
                     (2 if n == len(b) else 1) / count, count)


def exact_sign_flips(differences: ArrayLike) -> ExactTest:
    """Of the mean of paired differences `[pairs]`, over all ways to exchange the two of each pair.

    The null is that a pair's two runs could as well be the other's (Fisher 1935).

    Raises:
        ValueError: there are none, one is not finite, or there are more than MOST_ARRANGEMENTS ways.
    """
    differences = checks.finite(differences, name="differences")
    n = len(differences)
    if not n:
        raise ValueError("differences: expected one at least, found none")
    count = _few_enough(2**n)
    signs = 1.0 - 2.0 * (np.arange(count)[:, None] >> np.arange(n) & 1)
    near = ROUNDING * np.abs(differences).max()
    return ExactTest(_as_large(signs @ differences, differences.sum(), near), 2 / count, count)


def _few_enough(arrangements: int) -> int:
    if arrangements > MAX_ARRANGEMENTS:
        raise ValueError(f"runs: expected {MAX_ARRANGEMENTS:,} arrangements at most, "
                         f"found {arrangements:,}")
    return arrangements


def _as_large(null: Floats, seen: float, near: float) -> float:
    return float(np.mean(np.abs(null) >= abs(seen) - near))


# --- Several tests at once -------------------------------------------------------------------


def holm(p: ArrayLike) -> Floats:
    """p-values corrected for their number, by steps (Holm 1979): `[tests]` → `[tests]`, each at most 1.

    A NaN is a test that could not be made: it stays NaN and is not counted.
    """
    raw = checks.numbers(p, "p")
    if raw.ndim != 1 or ((raw < 0) | (raw > 1)).any():
        raise ValueError("p: expected [tests] of numbers in [0, 1], or NaN of a test that could not be made, "
                         f"found {checks.shown(p)}")
    made = np.flatnonzero(~np.isnan(raw))
    order = made[np.argsort(raw[made], kind="stable")]
    corrected = np.full(raw.shape, np.nan)
    steps = raw[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected


def bootstrap_p(values: ArrayLike, *, replicates: int = 10_000, seed: int = 42,
                groups: ArrayLike | None = None) -> float:
    """Two-sided p of "the mean is zero": the share of resampled, centred means as far out (Efron 1993, 16.4).

    The values seen count as one replicate. NaN where there are fewer than two values or groups, or where all
    values, or the means of all groups, are equal but for rounding though the mean is not zero: there is no
    spread that could be resampled. Of a few values, whose mean can hardly be resampled, it is too small.
    """
    values = checks.finite(values)
    checks.count(replicates, "replicates")
    checks.seed(seed)
    members = np.arange(len(values)) if groups is None else checks.groups(groups, len(values))
    sizes = np.bincount(members)
    if len(sizes) < 2:
        return math.nan
    seen, centred = abs(float(values.mean())), values - values.mean()
    near = checks.COMPUTED * float(np.abs(values).max())
    if np.ptp(np.bincount(members, values) / sizes) <= near:
        return 1.0 if seen <= near else math.nan
    beyond, drawn = 1, 1
    for counts in resampled_counts(len(values), replicates, seed, groups):
        means = counts @ centred / counts.sum(axis=1)
        beyond, drawn = beyond + int((np.abs(means) >= seen - near).sum()), drawn + len(means)
    return beyond / drawn
