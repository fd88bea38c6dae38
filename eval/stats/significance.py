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
from ..metrics import auroc, auroc_relabelled, midranks
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
    labels = checks.labels(labels, both=True)
    a, b = (checks.scores(score, len(labels), name) for name, score in (("a", a), ("b", b)))
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(labels))
    null = []
    for start in range(0, permutations, rows):
        drawn = np.stack([rng.permutation(labels) for _ in range(min(rows, permutations - start))])
        null.append(auroc_relabelled(drawn, a) - auroc_relabelled(drawn, b))
    return _tested(labels, a, b, np.concatenate(null), count_observed)


def _tested(labels: NDArray, a: ArrayLike, b: ArrayLike, null: Floats,
            count_observed: bool) -> PermutationTest:
    area_a, area_b = auroc(labels, a), auroc(labels, b)
    seen = area_a - area_b
    extra = int(count_observed)
    def share(beyond: NDArray[np.bool_]) -> float:
        return float((beyond.sum() + extra) / (len(null) + extra))
    return PermutationTest(area_a, area_b, seen, share(null <= seen if seen < 0 else null >= seen),
                           share(np.abs(null) >= abs(seen)), null)


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
    labels = checks.labels(labels, both=True)
    a, b = (checks.scores(score, len(labels), name) for name, score in (("a", a), ("b", b)))
    areas, covariance = delong_covariance(labels, np.stack([a, b]))
    seen = float(areas[0] - areas[1])
    alike = np.array_equal(midranks(a), midranks(b))
    spread = float(np.sqrt(np.maximum(0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])))
    if spread == 0 and not alike:
        spread = math.nan
    reach = spread * float(special.ndtri((1 + checks.share(level, "level")) / 2))
    p = 1.0 if spread == 0 else float(2 * special.ndtr(-abs(seen) / spread))
    return DeLong(float(areas[0]), float(areas[1]), Interval(seen, seen - reach, seen + reach), p)


def delong_covariance(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """AUROCs `[scores]` and their covariance `[scores, scores]`.

    Args:
        scores: `[scores, items]`.
    """
    positive = checks.labels(labels, both=True)
    scores = runs_of(scores, len(positive), "scores")
    m, n = int(positive.sum()), int((~positive).sum())
    won_by_positive, won_by_negative = [], []
    for score in scores:
        ranks = midranks(score)
        won_by_positive.append((ranks[positive] - midranks(score[positive])) / n)
        won_by_negative.append(1 - (ranks[~positive] - midranks(score[~positive])) / m)
    v10, v01 = np.stack(won_by_positive), np.stack(won_by_negative)
    if m < 2 or n < 2:
        return v10.mean(axis=1), np.full((len(scores), len(scores)), np.nan)
    return v10.mean(axis=1), np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n


# --- Tests of a difference between two ways to train, of a few runs each ------------------------


class MeanDifference(NamedTuple):
    """A difference of two means with its interval, the degrees of freedom of t, and the two-sided p."""

    difference: Interval
    freedom: float
    p: float


def welch(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> MeanDifference:
    """The mean of runs `a` `[n]` less that of `b` `[m]`, whose spreads may differ (Welch 1947).

    All is NaN but the point where either has fewer than two runs, or where no run differs from the others of
    its kind, from which no spread can be estimated; p is 1 where all are equal.
    """
    a, b = _some_runs(a, b)
    seen = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return _student(seen, math.nan, math.nan, level)
    of_a, of_b = (float(runs.var(ddof=1)) / len(runs) for runs in (a, b))
    whole = of_a + of_b
    if whole == 0:
        return _student(seen, 0.0, math.nan, level)
    # By shares of the whole, whose squares are numbers even where those of the variances are not.
    freedom = 1 / ((of_a / whole) ** 2 / (len(a) - 1) + (of_b / whole) ** 2 / (len(b) - 1))
    return _student(seen, math.sqrt(whole), freedom, level)


def paired_t(differences: ArrayLike, level: float = 0.95) -> MeanDifference:
    """The mean of differences `[pairs]`, by Student's t; see `welch` for those without spread."""
    differences = checks.finite(differences, name="differences")
    if not len(differences):
        raise ValueError("differences: expected one at least, found none")
    n, seen = len(differences), float(np.mean(differences))
    if n < 2:
        return _student(seen, math.nan, math.nan, level)
    return _student(seen, float(differences.std(ddof=1)) / math.sqrt(n), n - 1, level)


def _student(seen: float, error: float, freedom: float, level: float) -> MeanDifference:
    checks.share(level, "level")
    if error == 0:
        return MeanDifference(Interval(seen, math.nan, math.nan), freedom, 1.0 if seen == 0 else math.nan)
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


MOST_ARRANGEMENTS = 2**20
ROUNDING = 1e-12  # of the largest value: what is nearer to what was seen is as large


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
    chosen = np.fromiter(itertools.chain.from_iterable(itertools.combinations(range(len(whole)), n)),
                         np.intp, count * n).reshape(count, n)
    return ExactTest(_as_large(centred[chosen].sum(axis=1), centred[:n].sum(), whole),
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
    return ExactTest(_as_large(signs @ differences, differences.sum(), differences), 2 / count, count)


def _few_enough(arrangements: int) -> int:
    if arrangements > MOST_ARRANGEMENTS:
        raise ValueError(f"runs: expected {MOST_ARRANGEMENTS:,} arrangements at most, "
                         f"found {arrangements:,}")
    return arrangements


def _as_large(null: Floats, seen: float, values: Floats) -> float:
    near = ROUNDING * float(np.abs(values).max())
    return float(np.mean(np.abs(null) >= abs(seen) - near))


# --- Several tests at once -------------------------------------------------------------------


def holm(p: ArrayLike) -> Floats:
    """p-values corrected for their number, by steps (Holm 1979): `[tests]` → `[tests]`, each at most 1.

    A NaN is a test that could not be made: it stays NaN and is not counted.
    """
    raw = np.asarray(p, float)
    if raw.ndim != 1 or ((raw < 0) | (raw > 1)).any():
        raise ValueError("p: expected [tests] of numbers in [0, 1], or NaN of a test that could not be made, "
                         f"found {p!r:.60}")
    made = np.flatnonzero(~np.isnan(raw))
    order = made[np.argsort(raw[made], kind="stable")]
    corrected = np.full(raw.shape, np.nan)
    steps = raw[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected


def bootstrap_p(values: ArrayLike, *, replicates: int = 10_000, seed: int = 42,
                groups: ArrayLike | None = None) -> float:
    """Two-sided p of "the mean is zero": the share of resampled, centred means as far out (Efron 1993, 16.4).

    The values seen count as one replicate. NaN where there are fewer than two values or groups, or no spread
    that could be resampled though the mean is not zero; of a few values, whose mean can hardly be resampled,
    it is too small.
    """
    values = checks.finite(values)
    if groups is not None:
        groups = checks.groups(groups, len(values))
    if len(values if groups is None else np.unique(groups)) < 2:
        return math.nan
    seen, centred = abs(float(values.mean())), values - values.mean()
    if seen and not np.ptp(values):
        return math.nan
    beyond, drawn = 1, 1
    for counts in resampled_counts(len(values), replicates, seed, groups):
        means = counts @ centred / counts.sum(axis=1)
        beyond, drawn = beyond + int((np.abs(means) >= seen).sum()), drawn + len(means)
    return beyond / drawn
