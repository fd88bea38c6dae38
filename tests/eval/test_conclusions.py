"""Sentences for numbers, also where a test could not be made."""

from __future__ import annotations

import math

import pytest
from tilelli_jax.eval import conclusions


@pytest.mark.parametrize(("p", "shown", "sure"), [
    (0.0004, "< 0.001", True), (0.0321, "0.032", True), (0.05, "0.050", False), (1.0, "1.000", False),
    (math.nan, "–", False), (None, "–", False)])
def test_a_p(p: float | None, shown: str, sure: bool) -> None:
    assert conclusions.format_p(p) == shown
    assert conclusions.is_significant(p) is sure and conclusions.is_significant(p, conclusions.FEW) is sure
    assert not conclusions.is_significant(p, conclusions.FEW - 1)
