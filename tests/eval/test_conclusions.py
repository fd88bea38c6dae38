"""Formatting and significance of p-values, including undefined ones."""

from __future__ import annotations

import math

import pytest
from tilelli_jax.eval import conclusions


@pytest.mark.parametrize(("p", "text", "significant"), [
    (0.0004, "< 0.001", True), (0.0321, "0.032", True), (0.05, "0.050", False), (1.0, "1.000", False),
    (math.nan, "–", False), (None, "–", False)])
def test_p_values(p: float | None, text: str, significant: bool) -> None:
    assert conclusions.format_p(p) == text
    assert conclusions.is_significant(p) is significant
    assert conclusions.is_significant(p, conclusions.FEW) is significant
    assert not conclusions.is_significant(p, conclusions.FEW - 1)
