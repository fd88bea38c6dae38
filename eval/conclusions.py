"""Sentences for numbers: what an interval and a p allow to be said, and no more than that."""

from __future__ import annotations

import math

from .stats import Interval

FEW = 20  # groups: with fewer, intervals are too narrow and p too small
ALPHA = 0.05  # corrected p below which a difference is called one


def format_interval(interval: Interval, digits: int = 3, sign: bool = False) -> str:
    """`0.590 [0.551, 0.627]`; with `sign`, `+0.013 [-0.002, +0.029]`."""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{interval.point:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def format_p(p: float | None) -> str:
    """`0.023`, or `< 0.001`; a dash for a test that could not be made (NaN, in JSON null)."""
    if p is None or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def against_chance(area: Interval, groups: int) -> str:
    """Of an AUROC over so many groups."""
    if groups < FEW or area.low <= 0.5 <= area.high:
        return "not told apart from chance"
    return "better than chance" if area.low > 0.5 else "worse than chance"


def is_significant(p: float | None, groups: int = FEW) -> bool:
    """Whether a difference of corrected p over so many groups may be called one; not without a p."""
    return groups >= FEW and p is not None and p < ALPHA


def too_few(groups: int, what: str = "items") -> list[str]:
    """A warning where there are, otherwise nothing."""
    return [] if groups >= FEW else [
        f"The held-out {what} are {groups} groups; intervals of fewer than {FEW} are too narrow and p too "
        "small: nothing here is sure."]
