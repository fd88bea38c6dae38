"""Selective answering: risk–coverage curves and the area under them (AURC).

Items are answered in order of increasing `scores` (predicted chance of an error). `errors` are the costs of
answering: 0 or 1, or any finite number. Both are `[items]`. Equal scores leave the order open; the risk is
then the expected risk over all orders of the tied items. A constant score thus has the risk of random
answering at every coverage (El-Yaniv & Wiener 2010; Geifman & El-Yaniv 2019).
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

GRID = tuple(round(0.05 * i, 2) for i in range(1, 21))  # coverages in tables and figures


class Ranking:
    """Items sorted by score with groups of ties: sorted once, evaluated under many weights."""

    def __init__(self, errors: ArrayLike, scores: ArrayLike):
        self.errors, scores = checks.finite(errors, name="errors"), checks.scores(scores)
        if self.errors.shape != scores.shape or not len(scores):
            raise ValueError(f"errors and scores: expected [items] of equal length, found "
                             f"{self.errors.shape} and {scores.shape}")
        self._order = np.argsort(scores, kind="stable")
        self._starts = checks.starts_of_ties(scores[self._order])

    def risks(self, coverages: ArrayLike | None = None, weights: ArrayLike | None = None) -> Floats:
        """Returns the expected mean error of the answered items, `[coverages]`.

        Within a group of ties the expected sum of errors is linear in the number of items answered.

        Args:
            coverages: `[coverages]`, above 0 and at most 1; None uses k/n for k = 1 … n.
            weights: `[items]` of integers, how often each item counts; None counts each once.
        """
        n = len(self.errors)
        return self._risks(None if coverages is None else _coverages(coverages),
                           np.ones(n) if weights is None else checks.counts(weights, n))

    def _risks(self, coverages: Floats | None, weights: Floats) -> Floats:
        counts = np.add.reduceat(weights[self._order], self._starts)
        sums = np.add.reduceat((weights * self.errors)[self._order], self._starts)
        answered, total = np.r_[0, np.cumsum(counts)], np.r_[0, np.cumsum(sums)]
        n = answered[-1]
        k = np.arange(1, n + 1) if coverages is None else coverages * n
        return np.interp(k, answered, total) / k


def _coverages(values: ArrayLike) -> Floats:
    coverages = checks.probabilities(values, name="coverages")
    if not coverages.all():
        raise ValueError("coverages: expected values above 0, found 0")
    return coverages


def aurc(errors: ArrayLike, scores: ArrayLike) -> float:
    """Returns the area under the risk–coverage curve: the mean expected risk at coverages 1/n, 2/n … 1."""
    return float(Ranking(errors, scores).risks().mean())


def fraction_of_oracle(errors: ArrayLike, scores: ArrayLike) -> float:
    """Returns the fraction of the oracle's AURC gain over random order (the prediction rejection ratio, PRR).

    0 is a random order, 1 the order of the true errors. NaN if all errors are equal up to rounding.
    """
    order, values = Ranking(errors, scores), checks.finite(errors, name="errors")
    return _fraction(float(order.risks().mean()), Ranking(values, values), np.ones(len(values)))


def _fraction(area: float, oracle: Ranking, weights: Floats) -> float:
    if not checks.varies(oracle.errors[weights > 0]):
        return math.nan
    random = float(weights @ oracle.errors / weights.sum())
    return (random - area) / (random - float(oracle._risks(None, weights).mean()))


@dataclasses.dataclass(frozen=True)
class RiskCoverage:
    """Risk–coverage curve of one score, with intervals.

    Attributes:
        coverages, risks: points of the curve, `[coverages]`.
        low, high: ends of the risks' intervals, `[coverages]`.
    """

    coverages: Floats
    risks: Floats
    low: Floats
    high: Floats
    aurc: Interval
    fraction_of_oracle: Interval


def risk_coverage(errors: ArrayLike, scores: ArrayLike, *, coverages: Sequence[float] = GRID,
                  replicates: int = 2000, seed: int = 42, level: float = 0.95,
                  groups: ArrayLike | None = None) -> RiskCoverage:
    """Returns the curve, the AURC and the fraction of the oracle's gain, with bootstrap percentile intervals.

    Each replicate is sorted again. Resampling only the answered items would treat the threshold as known.

    Args:
        coverages: points of the curve, above 0 and at most 1.
        level: confidence level of the intervals.
        groups: `[items]`, group of each item; the bootstrap resamples whole groups. None resamples items.
    """
    order, oracle, grid = Ranking(errors, scores), Ranking(errors, errors), _coverages(coverages)
    curves, areas, fractions = [], [], []
    for counts in resampled_counts(len(order.errors), replicates, seed, groups):
        for weights in counts.astype(float):
            curves.append(order._risks(grid, weights))
            areas.append(float(order._risks(None, weights).mean()))
            fractions.append(_fraction(areas[-1], oracle, weights))
    defined = np.asarray(fractions)
    defined = defined[~np.isnan(defined)]
    ends = [percentiles(risks, level) for risks in np.asarray(curves).T]
    return RiskCoverage(
        grid, order.risks(grid),
        np.array([low for low, _ in ends]), np.array([high for _, high in ends]),
        Interval(aurc(errors, scores), *percentiles(np.asarray(areas), level)),
        Interval(fraction_of_oracle(errors, scores), *percentiles(defined, level)))
