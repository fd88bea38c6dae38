"""Compares claims with measurements, line by line. Runs no network.

A tolerance t, a fraction, applies as follows:
    parameters   measured / claimed is from 1 − t to 1 + t. All other keys of the architecture must be equal.
    AUROC        measured differs from claimed by at most t, in AUROC. A relative tolerance would make little
                 sense: chance is ½, not 0, and the equally informative inverted signal, 0.46 for 0.54, would
                 get another tolerance.
    answers      the count differs by at most t · n, rounded down to whole answers: 1 of 20, none of 10. For
                 "at least", more is always allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..stats import Interval, exact_fraction
from .config import ArchitectureConfig, ClaimsConfig, CrossRegimeConfig
from .measurements import Measurements

ARCHITECTURE, CROSS_REGIME = "architecture", "cross-regime AUROC"
HELD_OUT, FALSE_INABILITY = "held-out abstention", "false inability"
SLACK = 1e-9  # so that 7 − 0.05 · 20 is 6 despite binary rounding


class Line(NamedTuple):
    """One quantity that is claimed or measured."""

    claim: str  # one of the four claims
    quantity: str
    expected: str | None  # None: not claimed
    measured: str | None  # None: the network has no such signal
    interval: Interval | None  # 95 % interval of an AUROC or a fraction
    holds: bool | None  # None: not claimed


def check(measurements: Measurements, claims: ClaimsConfig, tolerance: float) -> list[Line]:
    """Returns the lines of the four claims, in their order."""
    held_out, false_inability = claims.held_out, claims.false_inability
    lines = [*architecture(measurements.architecture, claims.architecture, tolerance),
             *cross_regime(measurements.cross_regime, claims.cross_regime, tolerance),
             answers(HELD_OUT, "refused", [answer.refused for answer in measurements.held_out],
                     held_out.at_least, tolerance, at_least=True)]
    if held_out.templates:
        lines.append(answers(HELD_OUT, "by template",
                             [answer.by_template for answer in measurements.held_out],
                             held_out.template_at_least, tolerance, at_least=True))
    return [*lines, answers(FALSE_INABILITY, "refused",
                            [answer.refused for answer in measurements.false_inability],
                            false_inability.refused, tolerance)]


def architecture(measured: ArchitectureConfig, claimed: ArchitectureConfig, tolerance: float) -> list[Line]:
    """Returns a line for each key: parameters within the tolerance, all others equal."""
    lines = []
    for field in dataclasses.fields(ArchitectureConfig):
        value, claim = getattr(measured, field.name), getattr(claimed, field.name)
        expected, holds = None, None
        if claim is not None and field.name == "parameters":
            expected = f"{claim:,} ± {100 * tolerance:g} %"
            holds = abs(value - claim) <= tolerance * claim + SLACK
        elif claim is not None:
            expected, holds = _format(claim), value == claim
        lines.append(Line(ARCHITECTURE, field.name, expected, _format(value), None, holds))
    return lines


def cross_regime(measured: Mapping[str, Interval], claimed: CrossRegimeConfig,
                 tolerance: float) -> list[Line]:
    """Returns a line for each signal that is claimed or measured; a claimed signal that is absent fails."""
    lines = []
    for name in dict.fromkeys((*measured, *claimed.ranges)):
        auroc, expected, holds = measured.get(name), None, None
        if name in claimed.ranges:
            low, high = claimed.ranges[name]
            limits = f"{low:.3f}" if low == high else f"{low:.3f} … {high:.3f}"
            expected = f"{limits} ± {tolerance:g}"
            reach = tolerance + SLACK
            holds = auroc is not None and low - reach <= auroc.point <= high + reach
        point = None if auroc is None else f"{auroc.point:.3f}"
        lines.append(Line(CROSS_REGIME, name, expected, point, auroc, holds))
    return lines


def answers(claim: str, quantity: str, flags: Sequence[bool], claimed: int | None, tolerance: float, *,
            at_least: bool = False) -> Line:
    """Returns a line for the number of answers that are flagged, with the exact interval of their fraction.

    Args:
        flags: `[answers]`, at least one.
        claimed: the claimed count; None: not claimed.
        at_least: whether larger counts meet the claim as well.
    """
    n, count = len(flags), sum(flags)
    expected, holds = None, None
    if claimed is not None:
        low, high = allowed(claimed, n, tolerance)
        high = n if at_least else high
        expected = f"at least {claimed} of {n}" if at_least else f"{claimed} of {n}"
        expected += f" ({low} … {high})" if (low < claimed if at_least else low < high) else ""
        holds = low <= count <= high
    return Line(claim, quantity, expected, f"{count} of {n}", exact_fraction(count, n), holds)


def allowed(count: int, n: int, tolerance: float) -> tuple[int, int]:
    """Returns the smallest and the largest count within `tolerance` · n of `count`."""
    reach = math.floor(tolerance * n + SLACK)
    return max(0, count - reach), min(n, count + reach)


def failing(lines: Sequence[Line]) -> list[str]:
    """Returns the claims that do not hold, each once, in their order."""
    return list(dict.fromkeys(line.claim for line in lines if line.holds is False))


# ---------------------------------------------------------------------------------------------


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return f"{value:,}" if isinstance(value, int) else value
