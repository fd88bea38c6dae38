"""How sure a number is: bootstrap intervals, permutation tests, DeLong's and Welch's, corrections.

Every function that resamples takes a seed and makes its own generator (PCG64), so that a number can
be made again. `labels` are 0 or 1 and `scores` `[items]`, as in `metrics`. Input that is not what a function
takes raises ValueError (`checks`): no number is made of NaN, nor of infinities that would have to be added.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.stats import beta

from eval import checks
from eval.checks import Floats
from eval.metrics import auroc, auroc_relabelled, auroc_weighted, midranks

BLOCK = 2**22  # numbers of one array at a time


class Interval(NamedTuple):
    """A number and the ends of its interval; they are NaN where there was nothing to resample."""

    point: float
    low: float
    high: float

    @classmethod
    def from_tree(cls, tree: Mapping[str, float | None]) -> Interval:
        """Of JSON as `tables.as_json` writes it, where null stands for NaN."""
        return cls(*(math.nan if tree[key] is None else tree[key]  # type: ignore[arg-type]
                     for key in ("point", "low", "high")))

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def percentiles(replicates: Floats, level: float = 0.95) -> tuple[float, float]:
    """The ends between which `level` of the replicates lie, as many below as above; NaN if there are none."""
    checks.share(level, "level")
    if not len(replicates):
        return math.nan, math.nan
    low, high = np.percentile(replicates, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


# --- Bootstrap -------------------------------------------------------------------------------


def resampled_counts(items: int, replicates: int, seed: int,
                     groups: ArrayLike | None = None) -> Iterator[NDArray[np.int64]]:
    """How often each item is drawn in each replicate: blocks `[some replicates, items]`.

    The stream is that of `choice(items, items)` called once for each replicate.

    Args:
        groups: `[items]`: what is drawn together, as questions about one paragraph are (cluster
            bootstrap); None draws single items.
    """
    rng = np.random.default_rng(seed)
    members: NDArray[np.intp] = np.arange(items)
    if not items:
        raise ValueError("items: expected one at least to resample, found none")
    if groups is not None:
        members = checks.groups(groups, items)
    n = int(members.max()) + 1
    rows = max(1, BLOCK // items)
    for start in range(0, replicates, rows):
        size = min(rows, replicates - start)
        picks = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(picks.ravel(), minlength=size * n).reshape(size, n)[:, members]


class PairedBootstrap:
    """AUROCs of several scores over the same resampled items, so that their differences are paired.

    Percentile intervals (Efron & Tibshirani 1993, ch. 13). A replicate of one class is left out.

    Args:
        scores: name → `[items]`, or `[runs, items]` of a method that was run several times, whose AUROC is
            then the mean over its runs.
        level: the share of replicates between the ends.
        groups: see `resampled_counts`.
        draw_runs: whether runs are resampled as well, the same of every method that has more than one:
            the interval is then for other runs, too. What n runs add to it is too little, by a factor near
            √(1 − 1/n).
    """

    def __init__(self, labels: ArrayLike, scores: Mapping[str, ArrayLike], *, replicates: int = 2000,
                 seed: int = 42, level: float = 0.95, groups: ArrayLike | None = None,
                 draw_runs: bool = False):
        self.level = level
        labels = checks.labels(labels)
        runs = {name: _runs(score, len(labels), name) for name, score in scores.items()}
        several = {len(found) for found in runs.values()} - {1}
        if draw_runs and len(several) > 1:
            raise ValueError(f"scores: expected as many runs of each, found {sorted(several)}")
        of_runs, n = np.random.default_rng([seed, 1]), max(several, default=1)
        self.points = {name: float(np.mean([auroc(labels, run) for run in found]))
                       for name, found in runs.items()}
        drawn: dict[str, list[Floats]] = {name: [] for name in scores}
        for counts in resampled_counts(len(labels), replicates, seed, groups):
            shares = of_runs.multinomial(n, np.full(n, 1 / n), len(counts)) / n
            for name, found in runs.items():
                areas = np.stack([auroc_weighted(labels, run, counts) for run in found], axis=1)
                drawn[name].append((areas * shares).sum(axis=1) if draw_runs and len(found) > 1 else
                                   areas.mean(axis=1))
        whole = {name: np.concatenate(parts) for name, parts in drawn.items()}
        self.replicates = {name: values[~np.isnan(values)] for name, values in whole.items()}

    def interval(self, name: str) -> Interval:
        """The AUROC of one score."""
        return Interval(self.points[name], *percentiles(self.replicates[name], self.level))

    def difference(self, a: str, b: str) -> Interval:
        """The AUROC of `a` less that of `b`."""
        return Interval(self.points[a] - self.points[b],
                        *percentiles(self.replicates[a] - self.replicates[b], self.level))

    def p(self, a: str, b: str) -> float:
        """Two-sided p of "the areas are equal": twice the share of replicates on the rarer side of 0.

        The data seen count as one replicate on either side.
        """
        found = self.replicates[a] - self.replicates[b]
        rarer = min(int((found <= 0).sum()), int((found >= 0).sum()))
        return min(1.0, 2 * (rarer + 1) / (len(found) + 1))


def _runs(scores: ArrayLike, items: int, name: str) -> Floats:
    """Scores `[items]` or `[runs, items]` as the latter, of one run at least."""
    found = np.atleast_2d(np.asarray(scores))
    if found.ndim != 2 or not len(found):
        raise ValueError(f"{name}: expected [items] or [runs, items], found shape {found.shape}")
    return np.stack([checks.scores(run, items, name) for run in found])


def bootstrap_mean(values: ArrayLike, *, replicates: int = 2000, seed: int = 42, level: float = 0.95,
                   groups: ArrayLike | None = None) -> Interval:
    """The mean of `[items]` values, with its percentile interval; NaN where there are none."""
    values = checks.finite(values)
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    means = [counts @ values / counts.sum(axis=1)
             for counts in resampled_counts(len(values), replicates, seed, groups)]
    return Interval(float(values.mean()), *percentiles(np.concatenate(means), level))


def bootstrap_two_way(values: ArrayLike, statistic: Callable[[Floats], Floats] = lambda means: means[0], *,
                      replicates: int = 2000, seed: int = 42, level: float = 0.95) -> Interval:
    """A statistic of means over runs and items, both of which are resampled; of one run, items alone.

    Runs and items are drawn independently, the same of all kinds (the pigeonhole bootstrap, Owen 2007): the
    interval is for other runs and other items, rather too wide than too narrow. A statistic that is not
    defined for a replicate (NaN: 0/0) is left out there; an end that would be infinite is NaN.

    Args:
        values: `[runs, items]`, or `[kinds, runs, items]` of several things that were measured of the same.
        statistic: means `[kinds]`, or `[kinds, replicates]` of many at once → one number for each.
    """
    cube = np.asarray(values, float)
    cube = cube[None] if cube.ndim == 2 else cube
    if cube.ndim != 3:
        raise ValueError(f"values: expected [runs, items] or [kinds, runs, items], found shape {cube.shape}")
    checks.finite(cube.ravel())
    _, runs, items = cube.shape
    if not runs or not items:
        return Interval(math.nan, math.nan, math.nan)
    of_runs, found = np.random.default_rng([seed, 1]), []
    for counts in resampled_counts(items, replicates, seed):
        shares = (of_runs.multinomial(runs, np.full(runs, 1 / runs), len(counts)) / runs if runs > 1 else
                  np.ones((len(counts), 1)))
        found.append(np.einsum("kri,bi,br->kb", cube, counts / items, shares, optimize=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.atleast_1d(statistic(np.concatenate(found, axis=1)))
        point = float(statistic(cube.mean(axis=(1, 2))))
        ends = percentiles(drawn[~np.isnan(drawn)], level)
    return Interval(point, *(end if math.isfinite(end) else math.nan for end in ends))


def bootstrap_of(statistic: Callable[[NDArray, Floats], float], labels: ArrayLike, scores: ArrayLike, *,
                 replicates: int = 1000, seed: int = 42, level: float = 0.95,
                 groups: ArrayLike | None = None, centred: bool = False) -> Interval:
    """Any statistic of labels `[items]` and scores with its percentile interval.

    What is not defined for a replicate (NaN) is left out.

    Args:
        scores: as in `PairedBootstrap`.
        centred: shift the ends by what the replicates' mean lies above the point, not below 0. For an
            error of calibration, which rises with every resampling: without it the point may lie below its
            interval.
    """
    labels = checks.labels(labels).astype(int)
    runs = _runs(scores, len(labels), "scores")

    def mean(chosen: NDArray[np.intp]) -> float:
        return float(np.mean([statistic(labels[chosen], run[chosen]) for run in runs]))
    every = np.arange(len(labels))
    found = np.array([mean(np.repeat(every, row)) for counts in
                      resampled_counts(len(labels), replicates, seed, groups) for row in counts])
    point, found = mean(every), found[~np.isnan(found)]
    low, high = percentiles(found, level)
    shift = float(found.mean()) - point if centred and len(found) else 0.0
    return Interval(point, max(0.0, low - shift) if centred else low, high - shift)


def exact_share(right: int, n: int, level: float = 0.95) -> Interval:
    """A share of independent items with Clopper & Pearson's interval (1934), which is never too narrow."""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"right, n: expected 0 ≤ right ≤ n and n of 1 at least, found {right} of {n}")
    half = (1 - checks.share(level, "level")) / 2
    low = 0.0 if right == 0 else float(beta.ppf(half, right, n - right + 1))
    high = 1.0 if right == n else float(beta.ppf(1 - half, right + 1, n - right))
    return Interval(right / n, low, high)


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
    scores = _runs(scores, len(positive), "scores")
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
        raise ValueError("p: expected [tests] of numbers in [0, 1], or NaN of a test that could not be made")
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
