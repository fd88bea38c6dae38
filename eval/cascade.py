"""A cheap model that hands the hard items to a dear one: error against cost.

An item is handed on where its score (the chance that the cheap model errs) is at least the threshold.
`small` and `large` are the two models' errors, `scores` the cheap one's; all `[items]`.
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

SLACK = 1e-9  # a share of the largest: what differs by less is equal


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one item costs. `pay_both`: an item handed on has cost the cheap call, too, as it does in use.

    Raises ValueError for a cost that is not finite, or below 0.
    """

    small: float = 1.0
    large: float = 5.0
    pay_both: bool = True

    def __post_init__(self) -> None:
        for name in ("small", "large"):
            checks.number(getattr(self, name), name, least=0)

    def of(self, share: ArrayLike) -> Floats:
        """The mean cost where a share of the items is handed on."""
        found = checks.numbers(share, "share")
        if not ((found >= 0) & (found <= 1)).all():
            raise ValueError(f"share: expected values in [0, 1], found {checks.shown(share)}")
        return self.small * (1 if self.pay_both else 1 - found) + self.large * found

    def coin(self, costs: ArrayLike) -> Floats:
        """The share of the items that a coin of these mean costs sends to the dear model, and to it alone.

        Raises:
            ValueError: the dear model costs no more than the cheap one.
        """
        if self.large <= self.small:
            raise ValueError(f"large: expected a cost above small, {self.small:g}, found {self.large:g}")
        return (checks.numbers(costs, "costs") - self.small) / (self.large - self.small)


@dataclasses.dataclass(frozen=True)
class Frontier:
    """One point for each threshold: all `[thresholds]`."""

    thresholds: Floats
    handed_on: Floats
    costs: Floats
    errors: Floats

    def dominating(self, always_small: float, always_large: float, costs: Costs) -> NDArray[np.bool_]:
        """Which points, between the two models' costs, err less than random routing at equal cost.

        The coin sends an item to one of the two models, and pays that one alone.
        """
        checks.number(always_small, "always_small")
        checks.number(always_large, "always_large")
        share = costs.coin(self.costs)
        coin = always_small + (always_large - always_small) * share
        slack = SLACK * max(abs(always_small), abs(always_large), np.abs(self.errors).max(initial=0))
        return (share > 0) & (share < 1) & (self.errors < coin - slack)

    def pareto(self) -> NDArray[np.bool_]:
        """Which points no other point beats in cost without losing in error; of equals, the first."""
        costs, errors = _ranks(self.costs), _ranks(self.errors)
        kept = np.zeros(len(costs), bool)
        best = len(costs)
        for i in np.lexsort((errors, costs)):
            if errors[i] < best:
                kept[i], best = True, errors[i]
        return kept


def _ranks(values: Floats) -> NDArray[np.intp]:
    """Ranks from 0; neighbours that differ by rounding alone share theirs."""
    order = np.argsort(values, kind="stable")
    apart = np.diff(values[order], prepend=values[order[:1]]) > SLACK * np.abs(values).max(initial=0)
    ranks = np.empty(len(values), np.intp)
    ranks[order] = np.cumsum(apart)
    return ranks


def frontier(small: ArrayLike, large: ArrayLike, scores: ArrayLike, costs: Costs,
             thresholds: Sequence[float] | None = None) -> Frontier:
    """The cascade at each threshold; by default at every score there is, and above all of them."""
    small, large = _errors(small, large)
    scores = checks.scores(scores, len(small))
    order = np.argsort(scores, kind="stable")
    if thresholds is None:  # above all of them even where one is infinite
        at = np.r_[np.unique(scores), np.inf]
        first = np.r_[checks.starts_of_ties(scores[order]), len(scores)]  # items from there on are handed on
    else:
        at = checks.scores(thresholds, name="thresholds")
        first = np.searchsorted(scores[order], at, side="left")
    kept = np.r_[0, np.cumsum(small[order])][first]
    handed = np.r_[np.cumsum(large[order][::-1])[::-1], 0][first]
    share = 1 - first / len(small)
    return Frontier(at, share, costs.of(share), (kept + handed) / len(small))


def oracle_frontier(small: ArrayLike, large: ArrayLike, costs: Costs) -> Frontier:
    """Handing on those first where the dear model gains most; thresholds are numbers of items handed on."""
    small, large = _errors(small, large)
    gain = np.sort(small - large)[::-1]
    share = np.arange(len(gain) + 1) / len(gain)
    errors = small.mean() - np.r_[0, np.cumsum(gain)] / len(gain)
    return Frontier(np.arange(len(gain) + 1.0), share, costs.of(share), errors)


def against_random_routing(small: ArrayLike, large: ArrayLike, scores: ArrayLike, costs: Costs, share: float, *,
                 replicates: int = 2000, seed: int = 42, groups: ArrayLike | None = None) -> Interval:
    """The cascade's mean error less that of random routing at equal cost, with a share of the items handed on.

    The share is to be said beforehand: of all thresholds, some beat the coin on the items they are picked on
    even where the score knows nothing. Of equal scores at the edge each is handed on in part. The coin pays
    for the model that it picks alone.

    Args:
        groups: `[items]`, what is resampled together.
    """
    small, large = _errors(small, large)
    scores = checks.scores(scores, len(small))
    share = checks.share(share, "share", whole=True)
    level = np.sort(scores)[::-1][max(0, math.ceil(share * len(scores)) - 1)]
    above, edge = scores > level, scores == level
    handed = above + edge * (share * len(scores) - above.sum()) / edge.sum()
    coin = min(1.0, float(costs.coin(costs.of(share))))
    gap = np.where(np.abs(handed - coin) > SLACK, handed - coin, 0.0)
    return bootstrap_mean(gap * (large - small), replicates=replicates, seed=seed, groups=groups)


def _errors(small: ArrayLike, large: ArrayLike) -> tuple[Floats, Floats]:
    of_small, of_large = checks.finite(small, name="small"), checks.finite(large, name="large")
    if of_small.shape != of_large.shape or not len(of_small):
        raise ValueError(f"small and large: expected [items] of one length, found {of_small.shape} and "
                         f"{of_large.shape}")
    return of_small, of_large
