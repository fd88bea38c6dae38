"""Thresholds on P(knows): two thresholds give three verdicts.

The verdict is "likely knows" for scores of at least `knows_from`, and "likely beyond its knowledge" for
scores below `unknown_below`. The precision of a verdict is the fraction of its items for which it is true.
`precision_thresholds` selects the thresholds on the given items, as Recall does: as far out as the precision
reaches the target there. New items then reach the target at best about half of the time.
`guaranteed_thresholds` guarantees the target for new items.

`labels` are 1 where the answer is known; `scores` increase with the chance of a 1; both are `[items]`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom

from . import checks
from .checks import Floats
from .metrics import check_scored
from .stats import Interval, holm

Verdict = Literal["likely knows", "uncertain", "likely beyond its knowledge"]
GRID = tuple(k / 20 for k in range(1, 20))  # thresholds on probabilities


class Thresholds(NamedTuple):
    """Known from `knows_from` on, unknown below `unknown_below`; None if no item gets the verdict."""

    knows_from: float | None
    unknown_below: float | None


def verdict(score: float, knows_from: float | None, unknown_below: float | None) -> Verdict:
    """Returns the verdict for one score. If knows_from < unknown_below, knows_from takes precedence for
    scores between them.

    Raises ValueError for a score or threshold that is not a number.
    """
    score = checks.score(score)
    knows_from, unknown_below = (None if threshold is None else checks.score(threshold, name)
                  for threshold, name in ((knows_from, "knows_from"), (unknown_below, "unknown_below")))
    if knows_from is not None and score >= knows_from:
        return "likely knows"
    if unknown_below is not None and score < unknown_below:
        return "likely beyond its knowledge"
    return "uncertain"


def precision_thresholds(labels: ArrayLike, probabilities: ArrayLike, target: float) -> Thresholds:
    """Returns the most inclusive thresholds whose precision on these items is at least `target`.

    Recall's rule: knows_from is the probability at the last rank, counted from the top, down to which the
    fraction of 1s reaches the target; unknown_below is the probability at the last rank, counted from the
    bottom, up to which the fraction of 0s does. Tied items keep their order, and a rank may lie within a tie:
    knows_from's precision can then be below the target even on these items. knows_from may lie below
    unknown_below.
    """
    known, scores = check_scored(labels, probabilities)
    checks.fraction(target, "target")

    def last_score(order: NDArray[np.intp], correct: NDArray[np.bool_]) -> float | None:
        precisions = np.cumsum(correct[order]) / np.arange(1, len(order) + 1)
        reached = np.flatnonzero(precisions >= target)
        return float(scores[order[reached[-1]]]) if len(reached) else None
    return Thresholds(last_score(np.argsort(-scores, kind="stable"), known),
                      last_score(np.argsort(scores, kind="stable"), ~known))


def guaranteed_thresholds(labels: ArrayLike, scores: ArrayLike, target: float, confidence: float,
                          grid: ArrayLike = GRID) -> Thresholds:
    """Returns thresholds whose precision on future items is at least `target`, with probability `confidence`.

    Learn-then-Test (Angelopoulos et al. 2021, arXiv:2110.01052): for every threshold of a grid, the function
    tests the null hypothesis that the precision is below the target. Of the thresholds with a rejected null,
    it returns the one that covers the most items. With probability ≥ `confidence` over the draw of these
    items, P(1 | score ≥ knows_from) ≥ target and P(0 | score < unknown_below) ≥ target hold together: the two
    sides share the error probability, 1 − confidence, equally. A side is None if no threshold can be
    guaranteed. This is always so with fewer than log(error of a side / number of thresholds) / log(target)
    items on the side.

    The items must be drawn independently from the distribution of the future items: at most one item per
    group, and none on which the score was fitted or calibrated. unknown_below is never above knows_from:
    otherwise knows_from, which takes precedence in `verdict`, would remove items from the set for which
    unknown_below is guaranteed.

    Args:
        target: precision to guarantee, between 0 and 1.
        confidence: probability of the guarantee, between 0 and 1.
        grid: candidate thresholds in any order, chosen independently of these items: fixed numbers, or
            quantiles of other items' scores. Each candidate costs a little of the confidence.

    Raises:
        ValueError: target or confidence is outside (0, 1), or the grid is empty or contains NaN.
    """
    known, scores = check_scored(labels, scores)
    checks.fraction(target, "target")
    checks.fraction(confidence, "confidence")
    candidates = np.unique(checks.scores(grid, name="grid"))
    if not candidates.size:
        raise ValueError("grid: expected at least one threshold, found none")
    above = scores >= candidates[:, None]
    # The grid must not consist of these items' own scores. The test at a threshold assumes that the items
    # beyond it are independent draws from a set that was fixed in advance. A threshold placed at an item that
    # it counts defines no such set. The correction would also have to cover as many tests as there are items.
    error = (1 - confidence) / 2
    knows_from = _reaches_target(above.sum(axis=1), (above & known).sum(axis=1), target, error)
    unknown_below = _reaches_target((~above).sum(axis=1), (~above & ~known).sum(axis=1), target, error)
    knows_from_value = float(candidates[knows_from].min()) if knows_from.any() else None
    # The guarantee holds for all rejected nulls at once, so unknown_below may be chosen among them depending
    # on knows_from.
    below = candidates[unknown_below]
    if knows_from_value is not None:
        below = below[below <= knows_from_value]
    return Thresholds(knows_from_value, float(below.max()) if below.size else None)


def _reaches_target(n: NDArray[np.integer], correct: NDArray[np.integer], target: float,
                    error: float) -> NDArray[np.bool_]:
    """Returns which thresholds `[grid]` reach the target: with probability ≥ 1 − error all returned ones do.

    If the precision beyond a threshold is below the target, k or more of n items are correct with probability
    at most P(Binomial(n, target) ≥ k). This is exact for any n. The tests depend on each other because their
    sets are nested. Bonferroni's correction allows for dependence, and so does Holm's, which rejects at least
    as many nulls.

    Args:
        n: number of items beyond each threshold, `[grid]`.
        correct: how many of them the verdict is true of, `[grid]`.
    """
    # Fixed-sequence testing would need no correction, but it must start at a threshold that passes. The
    # strictest threshold, where the precision is highest, does not: with hardly any item beyond it, even the
    # best outcome is not significant, and the sequence ends at its first test.
    p: Floats = binom.sf(correct - 1, n, target)  # 1 where n is 0
    return holm(p) <= error


# --- Abstention ------------------------------------------------------------------------------


class ConformalThreshold(NamedTuple):
    """Threshold above which a model abstains; infinity never abstains.

    Attributes:
        value: the threshold.
        interval: confidence interval of the population quantile that `value` estimates; its ends may be
            infinite.
        measured: false-positive rate on the calibration prompts.
        expected: false-positive rate on new prompts of the same kind: mean over calibrations, and range.
    """

    value: float
    interval: Interval
    measured: float
    expected: Interval


def conformal_threshold(scores: ArrayLike, target_fpr: float, level: float = 0.95) -> ConformalThreshold:
    """Returns the threshold at which the model abstains on at most `target_fpr` of answerable prompts.

    The threshold is the ⌈(n + 1)(1 − target)⌉-th smallest of n scores. If calibration prompts and new prompts
    come from one distribution, a new prompt exceeds it with probability at most the target, averaged over
    calibrations (conformal prediction, Vovk et al. 2005). For one calibration the rate has a Beta
    distribution, whose range is `expected`. With fewer than 1/target − 1 prompts the only valid threshold is
    infinity: never abstain. Both intervals are exact without ties, and lie somewhat too high with ties.

    Args:
        scores: `[prompts]` of one model, higher for abstaining, of answerable prompts on which nothing was
            fitted or evaluated.
        target_fpr: maximum false-positive rate, between 0 and 1.
        level: confidence level of both intervals.
    """
    ordered = np.sort(checks.scores(scores))
    if not len(ordered):
        raise ValueError("scores: expected at least one prompt, found none")
    checks.fraction(target_fpr, "target_fpr")
    checks.fraction(level, "level")
    n, tail = len(ordered), (1 - level) / 2
    order_statistics = np.concatenate([[-math.inf], ordered, [math.inf]])
    rank = min(n + 1, math.ceil((n + 1) * (1 - target_fpr) - 1e-9))
    low, high = (int(binom.ppf(quantile, n, 1 - target_fpr)) for quantile in (tail, 1 - tail))
    value = float(order_statistics[rank])
    rate = beta(n + 1 - rank, rank) if rank <= n else None
    expected = (Interval((n + 1 - rank) / (n + 1), *map(float, rate.ppf([tail, 1 - tail]))) if rate else
                Interval(0.0, 0.0, 0.0))
    interval = Interval(value, float(order_statistics[low]), float(order_statistics[high + 1]))
    return ConformalThreshold(value, interval, float((ordered > value).mean()), expected)


def conformal_min_items(target_fpr: float) -> int:
    """Returns the minimum number of scores for which `conformal_threshold` returns a finite threshold."""
    return max(1, math.ceil(1 / checks.fraction(target_fpr, "target_fpr") - 1 - 1e-9))
