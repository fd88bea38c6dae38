"""A cascade: a cheap model routes hard items to a larger, more expensive model. Error against cost.

An item is routed to the large model where its score (the predicted chance that the small model errs) is at
least the threshold. `small` and `large` are the errors of the two models, `scores` those of the small model;
all are `[items]`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .checks import Floats
from .stats import Interval, bootstrap_mean

SLACK = 1e-9  # differences up to this fraction of the largest value count as equal


@dataclasses.dataclass(frozen=True)
class Costs:
    """Cost of one item under each model.

    Raises ValueError for a cost that is not finite or is negative.

    Attributes:
        routed_pays_both: whether a routed item also pays for the small model, as in deployment.
    """

    small: float = 1.0
    large: float = 5.0
    routed_pays_both: bool = True

    def __post_init__(self) -> None:
        for name in ("small", "large"):
            checks.number(getattr(self, name), name, min=0)

    def mean(self, fraction: ArrayLike) -> Floats:
        """Returns the mean cost of an item if this fraction of the items is routed to the large model."""
        routed = checks.numbers(fraction, "fraction")
        if not ((routed >= 0) & (routed <= 1)).all():
            raise ValueError(f"fraction: expected values in [0, 1], found {checks.short_repr(fraction)}")
        return self.small * (1 if self.routed_pays_both else 1 - routed) + self.large * routed

    def random_fraction(self, costs: ArrayLike) -> Floats:
        """Returns the fraction of items that random routing sends to the large model at these mean costs.

        Random routing pays only for the model that it chooses.

        Raises:
            ValueError: the large model costs no more than the small one.
        """
        if self.large <= self.small:
            raise ValueError(f"large: expected a cost above small, {self.small:g}, found {self.large:g}")
        return (checks.numbers(costs, "costs") - self.small) / (self.large - self.small)


@dataclasses.dataclass(frozen=True)
class Frontier:
    """One point per threshold: all `[thresholds]`.

    Attributes:
        routed_fraction: fraction of the items that is routed to the large model.
        costs: mean cost of an item.
        errors: mean error of the cascade.
    """

    thresholds: Floats
    routed_fraction: Floats
    costs: Floats
    errors: Floats

    def dominating(self, always_small: float, always_large: float, costs: Costs) -> NDArray[np.bool_]:
        """Returns which points have a lower error than random routing at equal cost.

        Only points whose cost lies between the costs of the two models can dominate. Random routing pays
        only for the model that it chooses.

        Args:
            always_small, always_large: mean errors of each model on all items.
        """
        checks.number(always_small, "always_small")
        checks.number(always_large, "always_large")
        fraction = costs.random_fraction(self.costs)
        random = always_small + (always_large - always_small) * fraction
        slack = SLACK * max(abs(always_small), abs(always_large), np.abs(self.errors).max(initial=0))
        return (fraction > 0) & (fraction < 1) & (self.errors < random - slack)

    def pareto(self) -> NDArray[np.bool_]:
        """Returns which points are Pareto-optimal in cost and error; of equal points, the first."""
        costs, errors = _ranks(self.costs), _ranks(self.errors)
        optimal = np.zeros(len(costs), bool)
        best = len(costs)
        for i in np.lexsort((errors, costs)):
            if errors[i] < best:
                optimal[i], best = True, errors[i]
        return optimal


def _ranks(values: Floats) -> NDArray[np.intp]:
    """Returns ranks from 0; neighbours that differ only by rounding share a rank."""
    order = np.argsort(values, kind="stable")
    new_rank = np.diff(values[order], prepend=values[order[:1]]) > SLACK * np.abs(values).max(initial=0)
    ranks = np.empty(len(values), np.intp)
    ranks[order] = np.cumsum(new_rank)
    return ranks


def frontier(small: ArrayLike, large: ArrayLike, scores: ArrayLike, costs: Costs,
             thresholds: Sequence[float] | None = None) -> Frontier:
    """Evaluates the cascade at each threshold; None uses every distinct score and infinity."""
    small, large = _errors(small, large)
    scores = checks.scores(scores, len(small))
    order = np.argsort(scores, kind="stable")
    if thresholds is None:  # the last point, ∞, routes nothing, even if a score is infinite
        grid = np.r_[np.unique(scores), np.inf]
        first = np.r_[checks.starts_of_ties(scores[order]), len(scores)]  # index of the first routed item
    else:
        grid = checks.scores(thresholds, name="thresholds")
        first = np.searchsorted(scores[order], grid, side="left")
    small_sum = np.r_[0, np.cumsum(small[order])][first]
    large_sum = np.r_[np.cumsum(large[order][::-1])[::-1], 0][first]
    routed = 1 - first / len(small)
    return Frontier(grid, routed, costs.mean(routed), (small_sum + large_sum) / len(small))


def oracle_frontier(small: ArrayLike, large: ArrayLike, costs: Costs) -> Frontier:
    """Evaluates routing in order of the large model's true gain; thresholds are numbers of routed items."""
    small, large = _errors(small, large)
    gain = np.sort(small - large)[::-1]
    routed = np.arange(len(gain) + 1) / len(gain)
    errors = small.mean() - np.r_[0, np.cumsum(gain)] / len(gain)
    return Frontier(np.arange(len(gain) + 1.0), routed, costs.mean(routed), errors)


def against_random_routing(small: ArrayLike, large: ArrayLike, scores: ArrayLike, costs: Costs,
                           fraction: float, *, replicates: int = 2000, seed: int = 42,
                           groups: ArrayLike | None = None) -> Interval:
    """Returns the cascade's mean error minus that of random routing at equal cost, with its interval.

    The cascade routes the given fraction of the items. Fix the fraction in advance: among all thresholds,
    some beat random routing on the items on which they are selected even if the score is uninformative. Items
    tied at the threshold are each routed in part. Random routing pays only for the model that it chooses.

    Args:
        groups: `[items]`, group of each item; the bootstrap resamples whole groups. None resamples items.
    """
    small, large = _errors(small, large)
    scores = checks.scores(scores, len(small))
    fraction = checks.fraction(fraction, "fraction", allow_one=True)
    threshold = np.sort(scores)[::-1][max(0, math.ceil(fraction * len(scores)) - 1)]
    above, tied = scores > threshold, scores == threshold
    routed = above + tied * (fraction * len(scores) - above.sum()) / tied.sum()
    random = min(1.0, float(costs.random_fraction(costs.mean(fraction))))
    gap = np.where(np.abs(routed - random) > SLACK, routed - random, 0.0)
    return bootstrap_mean(gap * (large - small), replicates=replicates, seed=seed, groups=groups)


def _errors(small: ArrayLike, large: ArrayLike) -> tuple[Floats, Floats]:
    small_errors, large_errors = checks.finite(small, name="small"), checks.finite(large, name="large")
    if small_errors.shape != large_errors.shape or not len(small_errors):
        raise ValueError("small and large: expected [items] of equal length, found "
                         f"{small_errors.shape} and {large_errors.shape}")
    return small_errors, large_errors
