"""How sure a number is: bootstrap intervals and exact ones. Tests of differences are in `significance`.

Every function that resamples takes a seed and makes its own generator (PCG64), so that a number can
be made again. `labels` are 0 or 1 and `scores` `[items]`, as in `metrics`. Input that is not what a function
takes raises ValueError (`checks`): no number is made of NaN, nor of infinities that would have to be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from .. import checks
from ..checks import Floats
from ..metrics import auroc, auroc_weighted

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
    replicates = checks.scores(replicates, name="replicates")
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
    checks.count(items, "items")
    members = np.arange(items) if groups is None else checks.groups(groups, items)
    return _blocks(members, checks.count(replicates, "replicates"), checks.seed(seed))


def _blocks(members: NDArray[np.intp], replicates: int, seed: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    n = int(members.max()) + 1
    rows = max(1, BLOCK // len(members))
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
        self.level = checks.share(level, "level")
        labels = checks.labels(labels)
        runs = {name: runs_of(score, len(labels), name) for name, score in scores.items()}
        several = {len(found) for found in runs.values()} - {1}
        if draw_runs and len(several) > 1:
            raise ValueError(f"scores: expected as many runs of each, found {sorted(several)}")
        of_runs, n = np.random.default_rng([checks.seed(seed), 1]), max(several, default=1)
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
        checks.one_of(name, self.points, "name")
        return Interval(self.points[name], *percentiles(self.replicates[name], self.level))

    def difference(self, a: str, b: str) -> Interval:
        """The AUROC of `a` less that of `b`."""
        drawn = self._differences(a, b)
        return Interval(self.points[a] - self.points[b], *percentiles(drawn, self.level))

    def p(self, a: str, b: str) -> float:
        """Two-sided p of "the areas are equal": twice the share of replicates on the rarer side of 0.

        The data seen count as one replicate on either side. NaN where no replicate has both classes, or
        where the difference is the same in every one, and not 0: there is no spread that could be resampled.
        """
        found = self._differences(a, b)
        if not len(found) or (found[0] and np.ptp(found) <= checks.COMPUTED):
            return math.nan
        rarer = min(int((found <= 0).sum()), int((found >= 0).sum()))
        return min(1.0, 2 * (rarer + 1) / (len(found) + 1))

    def _differences(self, a: str, b: str) -> Floats:
        """Those of the replicates; one that is nothing but rounding is 0."""
        for name, one in (("a", a), ("b", b)):
            checks.one_of(one, self.points, name)
        found = self.replicates[a] - self.replicates[b]
        return np.where(np.abs(found) <= checks.COMPUTED, 0.0, found)


def runs_of(scores: ArrayLike, items: int, name: str) -> Floats:
    """Scores `[items]` or `[runs, items]` as the latter, of one run at least."""
    found = np.atleast_2d(checks.array(scores, name))
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
    cube = checks.numbers(values, "values")
    cube = cube[None] if cube.ndim == 2 else cube
    if cube.ndim != 3:
        raise ValueError(f"values: expected [runs, items] or [kinds, runs, items], found shape {cube.shape}")
    checks.finite(cube.ravel())
    _, runs, items = cube.shape
    if not runs or not items:
        return Interval(math.nan, math.nan, math.nan)
    of_runs, found = np.random.default_rng([checks.seed(seed), 1]), []
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
    runs = runs_of(scores, len(labels), "scores")

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
    checks.count(right, "right", least=0, most=checks.count(n, "n"))
    half = (1 - checks.share(level, "level")) / 2
    low = 0.0 if right == 0 else float(beta.ppf(half, right, n - right + 1))
    high = 1.0 if right == n else float(beta.ppf(1 - half, right + 1, n - right))
    return Interval(right / n, low, high)
