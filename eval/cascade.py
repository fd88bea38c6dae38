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

SLACK = 1e-9  # a point must lie below the line by more than rounding


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one item costs. `sunk`: an item handed on has cost the cheap call, too, as it does in use."""

    cheap: float = 1.0
    dear: float = 5.0
    sunk: bool = True

    def of(self, share: ArrayLike) -> Floats:
        """The mean cost where a share of the items is handed on."""
        share = np.asarray(share, float)
        return self.cheap * (1 if self.sunk else 1 - share) + self.dear * share


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
        share = (self.costs - costs.cheap) / (costs.dear - costs.cheap)
        coin = always_cheap + (always_dear - always_cheap) * share
        return (share > 0) & (share < 1) & (self.errors < coin - SLACK)

    def pareto(self) -> NDArray[np.bool_]:
        """Which points no other point beats in cost without losing in error."""
        order = np.lexsort((self.errors, self.costs))
        kept = np.zeros(len(order), bool)
        best = np.inf
        for i in order:
            if self.errors[i] < best:
                kept[i], best = True, self.errors[i]
        return kept


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
    if not 0 < share <= 1:
        raise ValueError(f"share: expected above 0, at most 1, found {share}")
    level = np.sort(scores)[::-1][max(0, math.ceil(share * len(scores)) - 1)]
    above, edge = scores > level, scores == level
    handed = above + edge * (share * len(scores) - above.sum()) / edge.sum()
    coin = min(1.0, float((costs.of(share) - costs.cheap) / (costs.dear - costs.cheap)))
    return bootstrap_mean((handed - coin) * (dear - cheap), replicates=replicates, seed=seed, groups=groups)


def _errors(cheap: ArrayLike, dear: ArrayLike) -> tuple[Floats, Floats]:
    of_cheap, of_dear = checks.finite(cheap, name="cheap"), checks.finite(dear, name="dear")
    if of_cheap.shape != of_dear.shape or not len(of_cheap):
        raise ValueError(f"cheap and dear: expected [items] of one length, found {of_cheap.shape} and "
                         f"{of_dear.shape}")
    return of_cheap, of_dear
