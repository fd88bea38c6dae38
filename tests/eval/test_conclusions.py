"""Formatting and significance of p-values, including undefined ones; warnings about few groups and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tilelli_jax.eval import conclusions
from tilelli_jax.eval.stats import Interval, exact_relabelling


@pytest.mark.parametrize(("p", "text", "significant"), [
    (0.0004, "< 0.001", True), (0.0321, "0.032", True), (0.05, "0.050", False), (1.0, "1.000", False),
    (math.nan, "–", False), (None, "–", False)])
def test_p_values(p: float | None, text: str, significant: bool) -> None:
    assert conclusions.format_p(p) == text
    assert conclusions.is_significant(p) is significant
    assert conclusions.is_significant(p, conclusions.FEW) is significant
    assert not conclusions.is_significant(p, conclusions.FEW - 1)


def test_intervals() -> None:
    assert conclusions.format_interval(Interval(-0.0001, -0.25, 0.5)) == "0.000 [−0.250, 0.500]"
    assert conclusions.format_interval(Interval(0.1, -0.25, 0.5), 2, sign=True) == "+0.10 [−0.25, +0.50]"
    assert conclusions.format_interval(Interval(-0.1, -0.25, 0.5), 2, sign=True) == "−0.10 [−0.25, +0.50]"


def test_a_difference_whose_interval_and_verdict_disagree() -> None:
    """Only there the sentence says why: p is corrected, the interval is not."""
    below, across = Interval(-0.2, -0.3, -0.1), Interval(-0.2, -0.3, 0.1)
    assert conclusions.format_difference(below, False) == (
        "−0.200 [−0.300, −0.100] (interval not corrected)")
    assert conclusions.format_difference(below, True) == "−0.200 [−0.300, −0.100]"
    assert conclusions.format_difference(across, False, 2) == "−0.20 [−0.30, +0.10]"


def test_few_groups() -> None:
    assert conclusions.few_groups_warning(20) == []
    assert conclusions.few_groups_warning(18, "questions") == [
        "The held-out questions form 18 groups; at least 20 are required. With fewer, intervals are too "
        "narrow and p-values too small: all comparisons are inconclusive."]


@pytest.mark.parametrize(("groups", "low", "high", "words"), [
    (20, 0.51, 0.9, "better than chance"), (20, 0.1, 0.49, "worse than chance"),
    (20, 0.5, 0.9, "not distinguishable from chance"), (19, 0.9, 0.99, "inconclusive")])
def test_comparison_with_chance(groups: int, low: float, high: float, words: str) -> None:
    assert conclusions.compare_with_chance(Interval((low + high) / 2, low, high), groups) == words


def test_few_seeds() -> None:
    assert conclusions.few_seeds_warning(3) == [
        "3 seeds; at least 4 are required: the exact p cannot be below 0.1, so no difference can be "
        "significant."]
    assert conclusions.few_seeds_warning(4) == conclusions.few_seeds_warning(5, 6) == []
    assert conclusions.few_seeds_warning(4, 2) == [
        "4 seeds; at least 5 are required: the exact p cannot be below 0.057 after correction for 2 "
        "comparisons, so no difference can be significant."]
    best = exact_relabelling(np.arange(3.0), np.arange(3.0) + 9)  # runs that do not overlap
    assert best.p == best.min_p == pytest.approx(0.1)
