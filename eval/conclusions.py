"""Sentences about numbers: they claim no more than an interval or a p-value supports."""

from __future__ import annotations

import itertools
import math

from .stats import Interval, min_p_of_relabelling
from .tables import format_number

FEW = 20  # groups: with fewer, bootstrap intervals are too narrow and p-values too small
ALPHA = 0.05  # significance level of corrected p-values
CORRECTION = "Intervals are not corrected for the number of comparisons; p-values are, by Holm's method."
PRR = ("PRR, the prediction–rejection ratio: how much the mean error of the answered items falls while all, "
       "or half of the items are rejected one by one, as a fraction of what the true errors as scores (the "
       "oracle) reach. 0 is a random order.")


def format_interval(interval: Interval, digits: int = 3, sign: bool = False) -> str:
    """Formats an interval: `0.590 [0.551, 0.627]`; with `sign`, `+0.013 [−0.002, +0.029]`."""
    form = f"{'+' if sign else ''}z.{digits}f"  # z: no negative zero
    point, low, high = (format_number(value, form) for value in (interval.point, interval.low, interval.high))
    return f"{point} [{low}, {high}]"


def format_p(p: float | None) -> str:
    """Formats a p-value: `0.023`, or `< 0.001`; a dash where the test is undefined (NaN, null in JSON)."""
    if p is None or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def compare_with_chance(area: Interval, groups: int) -> str:
    """Compares an AUROC, measured on this number of groups, with chance (0.5)."""
    if groups < FEW:
        return "inconclusive"
    if area.low <= 0.5 <= area.high:
        return "not distinguishable from chance"
    return "better than chance" if area.low > 0.5 else "worse than chance"


def is_significant(p: float | None, groups: int = FEW) -> bool:
    """Returns whether a difference is significant: corrected p below ALPHA on at least FEW groups.

    A difference without a p-value (None or NaN) is not significant.
    """
    return groups >= FEW and p is not None and p < ALPHA


def format_difference(difference: Interval, significant: bool, digits: int = 3) -> str:
    """Formats a difference; says that its interval is not corrected if it excludes 0 without significance."""
    note = " (interval not corrected)" if difference.excludes_zero and not significant else ""
    return format_interval(difference, digits, sign=True) + note


def few_groups_warning(groups: int, kind: str = "items") -> list[str]:
    """Returns a warning if there are fewer than FEW groups, otherwise nothing.

    Args:
        kind: what the held-out items are, in the plural.
    """
    return [] if groups >= FEW else [
        f"The held-out {kind} form {groups} groups; at least {FEW} are required. With fewer, intervals are "
        "too narrow and p-values too small: all comparisons are inconclusive."]


def few_seeds_warning(seeds: int, comparisons: int = 1) -> list[str]:
    """Returns a warning if an exact test of two models cannot be significant with these seeds, or nothing.

    Args:
        seeds: number of runs of each model.
        comparisons: number of tests that Holm's correction covers.
    """
    def min_p(n: int) -> float:
        return min(1.0, comparisons * min_p_of_relabelling(n, n))
    if min_p(seeds) < ALPHA:
        return []
    enough = next(n for n in itertools.count(seeds) if min_p(n) < ALPHA)
    corrected = f" after correction for {comparisons} comparisons" if comparisons > 1 else ""
    return [f"{seeds} seeds; at least {enough} are required: the exact p cannot be below "
            f"{min_p(seeds):.2g}{corrected}, so no difference can be significant."]
