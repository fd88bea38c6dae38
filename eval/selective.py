"""Selective answering: risk–coverage curves, the area under them (AURC), prediction–rejection ratios (PRR).

Items are answered in order of increasing `scores` (predicted chance of an error). `errors` are the costs of
answering: 0 or 1, or any finite number. Both are `[items]`. Equal scores leave the order open; the risk is
then the expected risk over all orders of the tied items. A constant score thus has the risk of random
answering at every coverage (El-Yaniv & Wiener 2010; Geifman & El-Yaniv 2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import checks
from .checks import Floats
from .stats import Interval, percentiles, resampled_counts

HALF = 0.5  # the second maximum rejection of PRR
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


def _coverages(values: ArrayLike, name: str = "coverages") -> Floats:
    coverages = checks.probabilities(values, name=name)
    if not coverages.all():
        raise ValueError(f"{name}: expected values above 0, found 0")
    return coverages


def aurc(errors: ArrayLike, scores: ArrayLike) -> float:
    """Returns the area under the risk–coverage curve: the mean expected risk at coverages 1/n, 2/n … 1."""
    return float(Ranking(errors, scores).risks().mean())


def prr(errors: ArrayLike, scores: ArrayLike, max_rejection: float = 1.0) -> float:
    """Returns the prediction–rejection ratio: the fraction of the oracle's gain over random rejection.

    The gain is that of the mean risk while the items with the highest scores are rejected, from none to the
    fraction `max_rejection` (Malinin et al. 2017; LM-Polygraph's `PredictionRejectionArea`). 0 is a random
    order, 1 the order of the true errors. NaN if all errors are equal up to rounding, or if too few items
    may be rejected to differ.

    Args:
        max_rejection: above 0 and at most 1.
    """
    order, values = Ranking(errors, scores), checks.finite(errors, name="errors")
    (last,) = _coverages([max_rejection], "max_rejection")
    return _prr(order.risks(), Ranking(values, values), np.ones(len(values)), float(last))


def _prr(risks: Floats, oracle: Ranking, weights: Floats, max_rejection: float = 1.0) -> float:
    """`prr` of the risks at coverages 1/n, 2/n … 1."""
    rejected = int(max_rejection * len(risks))
    if rejected < 2 or not checks.varies(oracle.errors[weights > 0]):
        return math.nan
    random = float(weights @ oracle.errors / weights.sum())
    gain = random - float(oracle._risks(None, weights)[-rejected:].mean())
    return (random - float(risks[-rejected:].mean())) / gain


@dataclasses.dataclass(frozen=True)
class RiskCoverage:
    """Risk–coverage curve of one score, with intervals.

    Attributes:
        coverages, risks: points of the curve, `[coverages]`.
        low, high: ends of the risks' intervals, `[coverages]`.
        prr, prr_half: the prediction–rejection ratio while all, or half of the items are rejected.
    """

    coverages: Floats
    risks: Floats
    low: Floats
    high: Floats
    aurc: Interval
    prr: Interval
    prr_half: Interval

    def to_tree(self) -> dict[str, Any]:
        """Everything but the coverages, for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.name != "coverages"}

    @classmethod
    def from_tree(cls, coverages: Sequence[float], tree: Mapping[str, Any]) -> RiskCoverage:
        """The inverse of `to_tree`."""
        risks, low, high = (np.asarray(tree[name]) for name in ("risks", "low", "high"))
        area, ratio, half = (Interval.from_tree(tree[name]) for name in ("aurc", "prr", "prr_half"))
        return cls(np.asarray(coverages), risks, low, high, area, ratio, half)


def risk_coverage(errors: ArrayLike, scores: ArrayLike, *, coverages: Sequence[float] = GRID,
                  replicates: int = 2000, seed: int = 42, level: float = 0.95,
                  groups: ArrayLike | None = None) -> RiskCoverage:
    """Returns the curve, the AURC and the PRR, with bootstrap percentile intervals.

    Each replicate is sorted again. Resampling only the answered items would treat the threshold as known.

    Args:
        coverages: points of the curve, above 0 and at most 1.
        level: confidence level of the intervals.
        groups: `[items]`, group of each item; the bootstrap resamples whole groups. None resamples items.
    """
    order, oracle, grid = Ranking(errors, scores), Ranking(errors, errors), _coverages(coverages)
    curves, areas, ratios = [], [], []
    for counts in resampled_counts(len(order.errors), replicates, seed, groups):
        for weights in counts.astype(float):
            curves.append(order._risks(grid, weights))
            risks = order._risks(None, weights)
            areas.append(float(risks.mean()))
            ratios.append([_prr(risks, oracle, weights, part) for part in (1.0, HALF)])
    ends = [percentiles(risks, level) for risks in np.asarray(curves).T]
    return RiskCoverage(
        grid, order.risks(grid),
        np.array([low for low, _ in ends]), np.array([high for _, high in ends]),
        Interval(aurc(errors, scores), *percentiles(np.asarray(areas), level)),
        *(Interval(prr(errors, scores, part), *percentiles(column[~np.isnan(column)], level))
          for part, column in zip((1.0, HALF), np.asarray(ratios).T, strict=True)))
