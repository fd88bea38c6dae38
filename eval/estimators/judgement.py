"""Scores from one more prompt, in which the network judges its own answer."""

from __future__ import annotations

import math
import re

from .. import checks

_NUMBER = re.compile(r"(?<![\w.])(\d+(?:[.,]\d+)?)\s*(%|per ?cent|/\s*100?\b|out of 100?\b)?", re.IGNORECASE)


def p_true(true_logit: float, false_logit: float) -> float:
    """P("True") against its alternative, normalised over the two (Kadavath et al. 2022, arXiv:2207.05221)."""
    difference = checks.number(true_logit, "true_logit") - checks.number(false_logit, "false_logit")
    return 1 / (1 + math.exp(-difference)) if difference > -700 else 0.0


def verbalised(reply: str) -> float:
    """The confidence, 0 to 1, that a reply states in words (Tian et al. 2023, arXiv:2305.14975).

    The first number counts: "85 %", "8/10", "90 out of 100"; without a unit, a number with a decimal point up
    to 1 is a fraction and any other one a per cent. NaN if there is none, or if it is above its maximum.
    """
    match = _NUMBER.search(reply)
    if match is None:
        return math.nan
    number, unit = float(match[1].replace(",", ".")), (match[2] or "").replace(" ", "").lower()
    is_fraction = not unit and number <= 1 and match[1] != str(int(number))
    maximum = 10 if unit in ("/10", "outof10") else 1 if is_fraction else 100
    return number / maximum if number <= maximum else math.nan
