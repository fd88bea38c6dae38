"""A cheap model that hands the hard items to a dear one: error against cost.

An item is handed on where its score (the chance that the cheap model errs) is at least the threshold.
`cheap` and `dear` are the two models' errors, `scores` the cheap one's; all `[items]`.
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
    """What one item costs. `sunk`: an item handed on has cost the cheap call, too, as it does in use.

    Raises ValueError for a cost that is not finite, or below 0.
    """

    cheap: float = 1.0
    dear: float = 5.0
    sunk: bool = True

    def __post_init__(self) -> None:
        for name in ("cheap", "dear"):
            checks.number(getattr(self, name), name, least=0)

    def of(self, share: ArrayLike) -> Floats:
        """The mean cost where a share of the items is handed on."""
        found = checks.numbers(share, "share")
        if not ((found >= 0) & (found <= 1)).all():
            raise ValueError(f"share: expected values in [0, 1], found {checks.shown(share)}")
        return self.cheap * (1 if self.sunk else 1 - found) + self.dear * found

    def coin(self, costs: ArrayLike) -> Floats:
        """The share of the items that a coin of these mean costs sends to the dear model, and to it alone.

        Raises:
            ValueError: the dear model costs no more than the cheap one.
        """
        if self.dear <= self.cheap:
            raise ValueError(f"dear: expected a cost above cheap, {self.cheap:g}, found {self.dear:g}")
        return (checks.numbers(costs, "costs") - self.cheap) / (self.dear - self.cheap)


@dataclasses.dataclass(frozen=True)
class Frontier:
    """One point for each threshold: all `[thresholds]`."""

    thresholds: Floats
    handed_on: Floats
    costs: Floats
    errors: Floats

    def dominating(self, always_cheap: float, always_dear: float, costs: Costs) -> NDArray[np.bool_]:
        """Which points, between the two models' costs, err less than a coin of the same cost.

        The coin sends an item to one of the two models, and pays that one alone.
        """
        checks.number(always_cheap, "always_cheap")
        checks.number(always_dear, "always_dear")
        share = costs.coin(self.costs)
        coin = always_cheap + (always_dear - always_cheap) * share
        slack = SLACK * max(abs(always_cheap), abs(always_dear), np.abs(self.errors).max(initial=0))
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


def frontier(cheap: ArrayLike, dear: ArrayLike, scores: ArrayLike, costs: Costs,
             thresholds: Sequence[float] | None = None) -> Frontier:
    """The cascade at each threshold; by default at every score there is, and above all of them."""
    cheap, dear = _errors(cheap, dear)
    scores = checks.scores(scores, len(cheap))
    order = np.argsort(scores, kind="stable")
    if thresholds is None:  # above all of them even where one is infinite
        at = np.r_[np.unique(scores), np.inf]
        first = np.r_[checks.starts_of_ties(scores[order]), len(scores)]  # items from there on are handed on
    else:
        at = checks.scores(thresholds, name="thresholds")
        first = np.searchsorted(scores[order], at, side="left")
    kept = np.r_[0, np.cumsum(cheap[order])][first]
    handed = np.r_[np.cumsum(dear[order][::-1])[::-1], 0][first]
    share = 1 - first / len(cheap)
    return Frontier(at, share, costs.of(share), (kept + handed) / len(cheap))


def oracle_frontier(cheap: ArrayLike, dear: ArrayLike, costs: Costs) -> Frontier:
    """Handing on those first where the dear model gains most; thresholds are numbers of items handed on."""
    cheap, dear = _errors(cheap, dear)
    gain = np.sort(cheap - dear)[::-1]
    share = np.arange(len(gain) + 1) / len(gain)
    errors = cheap.mean() - np.r_[0, np.cumsum(gain)] / len(gain)
    return Frontier(np.arange(len(gain) + 1.0), share, costs.of(share), errors)


def against_coin(cheap: ArrayLike, dear: ArrayLike, scores: ArrayLike, costs: Costs, share: float, *,
                 replicates: int = 2000, seed: int = 42, groups: ArrayLike | None = None) -> Interval:
    """The cascade's mean error less that of a coin of the same cost, with a share of the items handed on.

    The share is to be said beforehand: of all thresholds, some beat the coin on the items they are picked on
    even where the score knows nothing. Of equal scores at the edge each is handed on in part. The coin pays
    for the model that it picks alone.

    Args:
        groups: `[items]`, what is resampled together.
    """
    cheap, dear = _errors(cheap, dear)
    scores = checks.scores(scores, len(cheap))
    share = checks.share(share, "share", whole=True)
    level = np.sort(scores)[::-1][max(0, math.ceil(share * len(scores)) - 1)]
    above, edge = scores > level, scores == level
    handed = above + edge * (share * len(scores) - above.sum()) / edge.sum()
    coin = min(1.0, float(costs.coin(costs.of(share))))
    gap = np.where(np.abs(handed - coin) > SLACK, handed - coin, 0.0)
    return bootstrap_mean(gap * (dear - cheap), replicates=replicates, seed=seed, groups=groups)


def _errors(cheap: ArrayLike, dear: ArrayLike) -> tuple[Floats, Floats]:
    of_cheap, of_dear = checks.finite(cheap, name="cheap"), checks.finite(dear, name="dear")
    if of_cheap.shape != of_dear.shape or not len(of_cheap):
        raise ValueError(f"cheap and dear: expected [items] of one length, found {of_cheap.shape} and "
                         f"{of_dear.shape}")
    return of_cheap, of_dear
