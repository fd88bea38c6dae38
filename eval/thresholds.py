"""Where a probability is called knowledge, and where the want of it: two thresholds and three words.

"Knows" is said of scores of at least `green`, "does not know" of scores below `red`. Either has a
precision: the share that it is true of among the items that it is said of. `precision_thresholds` reads
the thresholds off the items at hand, as Recall does. It goes as far as the target is met there, so that
the next items meet it about every other time at best. `guaranteed_thresholds` promises it for the next
ones.

`labels` are 1 where the answer is known; `scores` rise with the chance of a 1; both are `[items]`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom

from . import checks
from .checks import Floats
from .metrics import checked
from .stats import Interval, holm

Verdict = Literal["likely knows", "uncertain", "likely beyond its knowledge"]
GRID = tuple(k / 20 for k in range(1, 20))  # for probabilities


class Thresholds(NamedTuple):
    """From where on an item is known, and below what it is not; None where that is said of no item."""

    green: float | None
    red: float | None


def verdict(score: float, green: float | None, red: float | None) -> Verdict:
    """The word for one score. Where green lies below red and the score between them, green wins.

    Raises ValueError for a score or threshold that is not a number.
    """
    score = checks.score(score)
    green, red = (None if line is None else checks.score(line, name)
                  for line, name in ((green, "green"), (red, "red")))
    if green is not None and score >= green:
        return "likely knows"
    if red is not None and score < red:
        return "likely beyond its knowledge"
    return "uncertain"


def precision_thresholds(labels: ArrayLike, probabilities: ArrayLike, target: float) -> Thresholds:
    """The furthest thresholds at which the precision among these items is at least `target`.

    Recall's rule: green is the probability at the last rank, from the top, down to which the share of 1s
    reaches the target; red that at the last rank from the bottom up to which the share of 0s does. Items
    of equal probability keep their order, and a rank may end among them: green's precision can then be
    below the target even here. Green may lie below red.
    """
    known, scores = checked(labels, probabilities)
    checks.share(target, "target")

    def furthest(order: NDArray[np.intp], right: NDArray[np.bool_]) -> float | None:
        shares = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
        reached = np.flatnonzero(shares >= target)
        return float(scores[order[reached[-1]]]) if len(reached) else None
    return Thresholds(furthest(np.argsort(-scores, kind="stable"), known),
                      furthest(np.argsort(scores, kind="stable"), ~known))


def guaranteed_thresholds(labels: ArrayLike, scores: ArrayLike, target: float, confidence: float,
                          grid: ArrayLike = GRID) -> Thresholds:
    """Thresholds that keep a precision of at least `target` among future items, with `confidence`.

    Learn-then-Test (Angelopoulos et al. 2021, arXiv:2110.01052): "its precision is below the target" is
    tested for every threshold of a grid, and of those for which it is rejected the one that speaks of
    the most items is taken. With probability ≥ `confidence` over the draw of these items, P(1 | score ≥
    green) ≥ target and P(0 | score < red) ≥ target hold together: the chance of error, 1 − confidence,
    is shared equally by the two. A side is None where nothing can be promised: with fewer than log(error
    of a side / thresholds) / log(target) items on it, that is so whatever they are.

    The items must be drawn independently, from where the future ones come: one of each group that
    belongs together, and none that the score was fitted to or calibrated with. Red is never above green,
    so that green's winning (`verdict`) takes nothing from the set for which red was promised.

    Args:
        grid: thresholds, in any order, fixed without a look at these items: numbers said beforehand, or
            quantiles of other items' scores. Every one of them costs a little of the confidence.

    Raises:
        ValueError: target or confidence outside (0, 1); a grid that is empty or holds no numbers.
    """
    known, found = checked(labels, scores)
    checks.share(target, "target")
    checks.share(confidence, "confidence")
    lines = np.unique(checks.scores(grid, name="grid"))
    if not lines.size:
        raise ValueError("grid: expected at least one threshold, found none")
    above = found >= lines[:, None]
    # The scores of these very items may not be the grid. The test at a threshold takes the items beyond
    # it for independent draws from a set that was named before. A threshold that is put where an item
    # lies, and counts that item, names no such set; and there would be as many tests to pay for as there
    # are items.
    error = (1 - confidence) / 2
    green = _kept(above.sum(axis=1), (above & known).sum(axis=1), target, error)
    red = _kept((~above).sum(axis=1), (~above & ~known).sum(axis=1), target, error)
    at = float(lines[green].min()) if green.any() else None
    # All that is kept is promised at once: among the kept, red may be chosen by where green is.
    below = lines[red] if at is None else lines[red][lines[red] <= at]
    return Thresholds(at, float(below.max()) if below.size else None)


def _kept(said: NDArray[np.integer], right: NDArray[np.integer], target: float,
          error: float) -> NDArray[np.bool_]:
    """Which thresholds `[grid]` reach the target: all that are named do, with probability ≥ 1 − error.

    Of n items beyond a threshold whose precision is below the target, k or more are right with a chance
    of at most P(Binomial(n, target) ≥ k): exact, for any n. The tests are of nested sets and depend on
    each other; Bonferroni's correction allows for that, and so do Holm's steps, which keep all that it
    keeps.
    """
    # A fixed sequence of tests would need no correction. It has to begin at a threshold that will pass,
    # and the strictest, where the precision is highest, is none: with hardly an item beyond it, not even
    # the best outcome is evidence enough, and the sequence ends where it began.
    p: Floats = binom.sf(right - 1, said, target)  # 1 where nothing is said
    return holm(p) <= error


# --- Declining ---------------------------------------------------------------------------------


class ConformalThreshold(NamedTuple):
    """From where on to abstain: where a score lies above `value`; infinity abstains never."""

    value: float
    interval: Interval  # of the quantile of all prompts that `value` estimates; ends may be infinite
    measured: float  # false-positive rate on the calibration prompts
    expected: Interval  # that of other prompts of their kind: its mean over calibrations, and its range


def conformal_threshold(scores: ArrayLike, target_fpr: float, level: float = 0.95) -> ConformalThreshold:
    """The threshold at which so many of the prompts that can be answered are declined, or fewer.

    The ⌈(n + 1)(1 − target)⌉-th of n scores in order: with calibration prompts and others drawn alike,
    the chance that one of the others lies above it is at most the target (conformal prediction, Vovk et
    al. 2005), on average over calibrations. For one calibration the rate is Beta distributed; `expected`
    has that range. With fewer than 1/target − 1 prompts nothing can be promised but never to abstain.
    Both intervals are exact where no scores are equal, and lie rather too high where some are.

    Args:
        scores: `[prompts]` of one network, pointing up, of prompts that can be answered and that nothing
            was fitted to or evaluated on.
    """
    found = np.sort(checks.scores(scores))
    if not len(found):
        raise ValueError("scores: expected those of one prompt at least, found none")
    checks.share(target_fpr, "target_fpr")
    checks.share(level, "level")
    n, tail = len(found), (1 - level) / 2
    ends = np.concatenate([[-math.inf], found, [math.inf]])
    rank = min(n + 1, math.ceil((n + 1) * (1 - target_fpr) - 1e-9))
    low, high = (int(binom.ppf(share, n, 1 - target_fpr)) for share in (tail, 1 - tail))
    value = float(ends[rank])
    rate = beta(n + 1 - rank, rank) if rank <= n else None
    expected = (Interval((n + 1 - rank) / (n + 1), *map(float, rate.ppf([tail, 1 - tail]))) if rate else
                Interval(0.0, 0.0, 0.0))
    return ConformalThreshold(value, Interval(value, float(ends[low]), float(ends[high + 1])),
                     float((found > value).mean()), expected)


def conformal_min_items(target_fpr: float) -> int:
    """Scores below which `conformal_threshold` can promise nothing but never to abstain."""
    return max(1, math.ceil(1 / checks.share(target_fpr, "target_fpr") - 1 - 1e-9))
