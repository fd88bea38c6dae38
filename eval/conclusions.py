"""Sentences about numbers: they claim no more than an interval or a p-value supports."""

from __future__ import annotations

import math

from .stats import Interval

FEW = 20  # groups: with fewer, bootstrap intervals are too narrow and p-values too small
ALPHA = 0.05  # significance level of corrected p-values


def format_interval(interval: Interval, digits: int = 3, sign: bool = False) -> str:
    """Formats an interval: `0.590 [0.551, 0.627]`; with `sign`, `+0.013 [-0.002, +0.029]`."""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{interval.point:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def format_p(p: float | None) -> str:
    """Formats a p-value: `0.023`, or `< 0.001`; a dash where the test is undefined (NaN, null in JSON)."""
    if p is None or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def compare_with_chance(area: Interval, groups: int) -> str:
    """Compares an AUROC, measured on this number of groups, with chance (0.5)."""
    if groups < FEW or area.low <= 0.5 <= area.high:
        return "not distinguishable from chance"
    return "better than chance" if area.low > 0.5 else "worse than chance"


def is_significant(p: float | None, groups: int = FEW) -> bool:
    """Returns whether a difference is significant: corrected p below ALPHA on at least FEW groups.

    A difference without a p-value (None or NaN) is not significant.
    """
    return groups >= FEW and p is not None and p < ALPHA


def few_groups_warning(groups: int, kind: str = "items") -> list[str]:
    """Returns a warning if there are fewer than FEW groups, otherwise nothing.

    Args:
        kind: what the held-out items are, in the plural.
    """
    return [] if groups >= FEW else [
        f"The held-out {kind} form {groups} groups. Below {FEW} groups intervals are too narrow and p-values "
        "too small: all comparisons are inconclusive."]
