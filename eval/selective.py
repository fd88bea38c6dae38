"""Answering only where the score is low: risk against coverage, and the area below (AURC).

Items are answered in order of rising `scores` (the chance of an error); `errors` are what answering
costs, 0 or 1 or any finite number. Both are `[items]`. Where scores are equal nothing tells which item is
answered first; the expected risk over all orders of equals is meant then, so that a constant score
has the risk of answering at random at every coverage (El-Yaniv & Wiener 2010; Geifman & El-Yaniv 2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from . import checks
from .checks import Floats
from .stats import Interval, percentiles, resampled_counts

GRID = tuple(round(0.05 * i, 2) for i in range(1, 21))  # coverages of tables and figures


class Order:
    """Items in order of their scores, in groups of equals: made once, read with many weights."""

    def __init__(self, errors: ArrayLike, scores: ArrayLike):
        self.errors, scores = checks.finite(errors, name="errors"), checks.scores(scores)
        if self.errors.shape != scores.shape or not len(scores):
            raise ValueError(f"errors and scores: expected [items] of one length, found {self.errors.shape} "
                             f"and {scores.shape}")
        self._order = np.argsort(scores, kind="stable")
        self._starts = checks.starts_of_ties(scores[self._order])

    def risks(self, coverages: ArrayLike | None = None, weights: ArrayLike | None = None) -> Floats:
        """The expected mean error of the items answered, at some coverages; of all of k/n by default.

        Between the ends of two groups the expected sum of errors rises in a straight line.

        Args:
            coverages: `[coverages]`, above 0 and at most 1.
            weights: `[items]` of whole numbers, how often each item counts.
        """
        n = len(self.errors)
        return self._risks(None if coverages is None else _shares(coverages),
                           np.ones(n) if weights is None else checks.counts(weights, n))

    def _risks(self, coverages: Floats | None, weights: Floats) -> Floats:
        counts = np.add.reduceat(weights[self._order], self._starts)
        sums = np.add.reduceat((weights * self.errors)[self._order], self._starts)
        answered, total = np.r_[0, np.cumsum(counts)], np.r_[0, np.cumsum(sums)]
        n = answered[-1]
        at = np.arange(1, n + 1) if coverages is None else coverages * n
        return np.interp(at, answered, total) / at


def _shares(coverages: ArrayLike) -> Floats:
    found = checks.probabilities(coverages, name="coverages")
    if not found.all():
        raise ValueError("coverages: expected values above 0, found 0")
    return found


def aurc(errors: ArrayLike, scores: ArrayLike) -> float:
    """The mean of the expected risks at the coverages 1/n, 2/n … 1."""
    return float(Order(errors, scores).risks().mean())


def fraction_of_oracle(errors: ArrayLike, scores: ArrayLike) -> float:
    """How far from a random order (0) to the order of the errors themselves (1) a score gets.

    NaN where all errors are equal but for rounding.
    """
    order, cost = Order(errors, scores), checks.finite(errors, name="errors")
    return _fraction(float(order.risks().mean()), Order(cost, cost), np.ones(len(cost)))


def _fraction(area: float, oracle: Order, weights: Floats) -> float:
    if not checks.varies(oracle.errors[weights > 0]):
        return math.nan
    random = float(weights @ oracle.errors / weights.sum())
    return (random - area) / (random - float(oracle._risks(None, weights).mean()))


@dataclasses.dataclass(frozen=True)
class RiskCoverage:
    """One score's risks at some coverages, each `[coverages]`, and its areas, with intervals."""

    coverages: Floats
    risks: Floats
    low: Floats
    high: Floats
    aurc: Interval
    fraction_of_oracle: Interval


def risk_coverage(errors: ArrayLike, scores: ArrayLike, *, coverages: Sequence[float] = GRID,
                  replicates: int = 2000, seed: int = 42, level: float = 0.95,
                  groups: ArrayLike | None = None) -> RiskCoverage:
    """The curve and its areas with percentile intervals over resampled items.

    Each resampled set is put in order anew: to resample only the items that were answered would be
    to take the threshold for known.
    """
    order, oracle, at = Order(errors, scores), Order(errors, errors), _shares(coverages)
    curves, areas, fractions = [], [], []
    for counts in resampled_counts(len(order.errors), replicates, seed, groups):
        for weights in counts.astype(float):
            curves.append(order._risks(at, weights))
            areas.append(float(order._risks(None, weights).mean()))
            fractions.append(_fraction(areas[-1], oracle, weights))
    known = np.asarray(fractions)
    ends = [percentiles(column, level) for column in np.asarray(curves).T]
    return RiskCoverage(
        at, order.risks(at),
        np.array([low for low, _ in ends]), np.array([high for _, high in ends]),
        Interval(aurc(errors, scores), *percentiles(np.asarray(areas), level)),
        Interval(fraction_of_oracle(errors, scores), *percentiles(known[~np.isnan(known)], level)))
