"""Bootstrap and exact confidence intervals. Tests of differences are in `significance`.

Every function that resamples takes a seed and creates its own generator (PCG64), so that results are
reproducible. `labels` are 0 or 1 and `scores` are `[items]`, as in `metrics`. Invalid input raises ValueError
(`checks`), as do NaN, and infinities where values are added.
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
from ..metrics import auroc, auroc_weighted, auroc_within

BLOCK = 2**22  # maximum number of elements of an array of replicates


class Interval(NamedTuple):
    """A point estimate and the ends of its interval; the ends are NaN if resampling was impossible."""

    point: float
    low: float
    high: float

    @classmethod
    def from_tree(cls, tree: Mapping[str, float | None]) -> Interval:
        """Reads an interval from JSON that `tables.json_with_nulls` wrote, where null stands for NaN."""
        return cls(*(math.nan if tree[key] is None else tree[key]  # type: ignore[arg-type]
                     for key in ("point", "low", "high")))

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def percentiles(replicates: Floats, level: float = 0.95) -> tuple[float, float]:
    """Returns the ends of the central `level` of the replicates; NaN without replicates."""
    checks.fraction(level, "level")
    replicates = checks.scores(replicates, name="replicates")
    if not len(replicates):
        return math.nan, math.nan
    low, high = np.percentile(replicates, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


# --- Bootstrap -------------------------------------------------------------------------------


def resampled_counts(items: int, replicates: int, seed: int,
                     groups: ArrayLike | None = None) -> Iterator[NDArray[np.int64]]:
    """Yields how often each item is drawn in each replicate: blocks `[some replicates, items]`.

    The random stream equals that of one call of `choice(items, items)` per replicate.

    Args:
        groups: `[items]`, group of each item, such as the paragraph of a question. Whole groups are drawn
            (cluster bootstrap); None draws single items.
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
    """AUROCs of several scores on the same resampled items, so that their differences are paired.

    Intervals are percentile intervals (Efron & Tibshirani 1993, ch. 13). Replicates with one class only are
    dropped.

    Args:
        scores: name → `[items]`, or `[runs, items]` of a method with several runs, whose AUROC is the mean
            over its runs.
        level: confidence level of the intervals.
        groups: see `resampled_counts`.
        strata: `[items]`; the AUROC is then that of pairs of the same stratum (`auroc_within`).
        draw_runs: also resample runs, the same ones for every method with more than one. The interval then
            covers new runs, too. With n runs it underestimates their contribution by a factor near
            √(1 − 1/n).

    Attributes:
        points: name → AUROC on all items.
        replicates: name → AUROCs `[replicates with both classes]`.
    """

    def __init__(self, labels: ArrayLike, scores: Mapping[str, ArrayLike], *, replicates: int = 2000,
                 seed: int = 42, level: float = 0.95, groups: ArrayLike | None = None,
                 strata: ArrayLike | None = None, draw_runs: bool = False):
        self.level = checks.fraction(level, "level")
        labels = checks.labels(labels)
        runs_by_name = {name: runs_of(score, len(labels), name) for name, score in scores.items()}
        run_counts = {len(runs) for runs in runs_by_name.values()} - {1}
        if draw_runs and len(run_counts) > 1:
            raise ValueError(f"scores: expected equally many runs of each, found {sorted(run_counts)}")
        run_rng, n = np.random.default_rng([checks.seed(seed), 1]), max(run_counts, default=1)

        def areas_of(run: Floats, counts: ArrayLike) -> Floats:
            return (auroc_weighted(labels, run, counts) if strata is None else
                    auroc_within(labels, run, counts, strata))
        once = np.ones((1, len(labels)))
        self.points = {name: float(np.mean([auroc(labels, run) if strata is None else areas_of(run, once)[0]
                                            for run in runs]))
                       for name, runs in runs_by_name.items()}
        blocks: dict[str, list[Floats]] = {name: [] for name in scores}
        for counts in resampled_counts(len(labels), replicates, seed, groups):
            run_weights = run_rng.multinomial(n, np.full(n, 1 / n), len(counts)) / n
            for name, runs in runs_by_name.items():
                areas = np.stack([areas_of(run, counts) for run in runs], axis=1)
                blocks[name].append((areas * run_weights).sum(axis=1) if draw_runs and len(runs) > 1 else
                                    areas.mean(axis=1))
        all_areas = {name: np.concatenate(parts) for name, parts in blocks.items()}
        self.replicates = {name: areas[~np.isnan(areas)] for name, areas in all_areas.items()}

    def interval(self, name: str) -> Interval:
        """Returns the AUROC of one score with its interval."""
        checks.one_of(name, self.points, "name")
        return Interval(self.points[name], *percentiles(self.replicates[name], self.level))

    def difference(self, a: str, b: str) -> Interval:
        """Returns the AUROC of `a` minus that of `b` with its interval."""
        ends = percentiles(self._differences(a, b), self.level)
        return Interval(self.points[a] - self.points[b], *ends)

    def p(self, a: str, b: str) -> float:
        """Returns the two-sided p of equal AUROCs: twice the fraction of replicates on the rarer side of 0.

        The observed data count as one replicate on either side. NaN if no replicate has both classes, or if
        all replicates have the same nonzero difference: resampling then shows no spread.
        """
        differences = self._differences(a, b)
        if not len(differences) or (differences[0] and np.ptp(differences) <= checks.COMPUTED_TOLERANCE):
            return math.nan
        rarer_side = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
        return min(1.0, 2 * (rarer_side + 1) / (len(differences) + 1))

    def _differences(self, a: str, b: str) -> Floats:
        """Returns the replicates' differences; one within rounding of 0 is 0."""
        for argument, name in (("a", a), ("b", b)):
            checks.one_of(name, self.points, argument)
        differences = self.replicates[a] - self.replicates[b]
        return np.where(np.abs(differences) <= checks.COMPUTED_TOLERANCE, 0.0, differences)


def runs_of(scores: ArrayLike, items: int, name: str) -> Floats:
    """Returns scores `[items]` or `[runs, items]` as `[runs, items]` with at least one run."""
    runs = np.atleast_2d(checks.array(scores, name))
    if runs.ndim != 2 or not len(runs):
        raise ValueError(f"{name}: expected [items] or [runs, items], found shape {runs.shape}")
    return np.stack([checks.scores(run, items, name) for run in runs])


def bootstrap_mean(values: ArrayLike, *, replicates: int = 2000, seed: int = 42, level: float = 0.95,
                   groups: ArrayLike | None = None) -> Interval:
    """Returns the mean of values `[items]` with its percentile interval; NaN without values."""
    values = checks.finite(values)
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    means = [counts @ values / counts.sum(axis=1)
             for counts in resampled_counts(len(values), replicates, seed, groups)]
    return Interval(float(values.mean()), *percentiles(np.concatenate(means), level))


def bootstrap_two_way(values: ArrayLike, statistic: Callable[[Floats], Floats] = lambda means: means[0], *,
                      replicates: int = 2000, seed: int = 42, level: float = 0.95) -> Interval:
    """Returns a statistic of means over runs and items, resampling both; with one run, resampling items only.

    Runs and items are drawn independently, the same ones for all kinds (pigeonhole bootstrap, Owen 2007). The
    interval covers new runs and new items, and is conservative. A replicate with an undefined statistic (NaN:
    0/0) is dropped; an infinite end becomes NaN.

    Args:
        values: `[runs, items]`, or `[kinds, runs, items]` of several quantities of the same runs and items.
        statistic: maps means `[kinds]`, or `[kinds, replicates]`, to one number per replicate.
    """
    cube = checks.numbers(values, "values")
    cube = cube[None] if cube.ndim == 2 else cube
    if cube.ndim != 3:
        raise ValueError(f"values: expected [runs, items] or [kinds, runs, items], found shape {cube.shape}")
    checks.finite(cube.ravel())
    _, runs, items = cube.shape
    if not runs or not items:
        return Interval(math.nan, math.nan, math.nan)
    run_rng, means = np.random.default_rng([checks.seed(seed), 1]), []
    for counts in resampled_counts(items, replicates, seed):
        run_weights = (run_rng.multinomial(runs, np.full(runs, 1 / runs), len(counts)) / runs if runs > 1 else
                       np.ones((len(counts), 1)))
        means.append(np.einsum("kri,bi,br->kb", cube, counts / items, run_weights, optimize=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        statistics = np.atleast_1d(statistic(np.concatenate(means, axis=1)))
        point = float(statistic(cube.mean(axis=(1, 2))))
        ends = percentiles(statistics[~np.isnan(statistics)], level)
    return Interval(point, *(end if math.isfinite(end) else math.nan for end in ends))


def bootstrap_of(statistic: Callable[[NDArray, Floats], float], labels: ArrayLike, scores: ArrayLike, *,
                 replicates: int = 1000, seed: int = 42, level: float = 0.95,
                 groups: ArrayLike | None = None, centred: bool = False) -> Interval:
    """Returns any statistic of labels `[items]` and scores with its percentile interval.

    Replicates with an undefined statistic (NaN) are dropped.

    Args:
        statistic: maps labels and the scores of one run to a number; averaged over runs.
        scores: `[items]` or `[runs, items]`, as in `PairedBootstrap`.
        centred: subtract the bootstrap bias (mean of the replicates minus the point) from both ends, and
            raise the low end to at least 0. Meant for calibration errors, which resampling inflates: without
            it the point may lie below its interval.
    """
    labels = checks.labels(labels).astype(int)
    runs = runs_of(scores, len(labels), "scores")

    def mean(items: NDArray[np.intp]) -> float:
        return float(np.mean([statistic(labels[items], run[items]) for run in runs]))
    all_items = np.arange(len(labels))
    values = np.array([mean(np.repeat(all_items, row)) for counts in
                       resampled_counts(len(labels), replicates, seed, groups) for row in counts])
    point, values = mean(all_items), values[~np.isnan(values)]
    low, high = percentiles(values, level)
    bias = float(values.mean()) - point if centred and len(values) else 0.0
    return Interval(point, max(0.0, low - bias) if centred else low, high - bias)


def exact_fraction(successes: int, n: int, level: float = 0.95) -> Interval:
    """Returns the fraction of successes among n independent items with its Clopper–Pearson interval (1934).

    The interval has at least the nominal coverage.
    """
    checks.count(successes, "successes", min=0, max=checks.count(n, "n"))
    tail = (1 - checks.fraction(level, "level")) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return Interval(successes / n, low, high)
