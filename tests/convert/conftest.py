"""Fixture for the conversion tests: caches the outline (names and shapes) of each network."""

from __future__ import annotations

import functools

import pytest

from tilelli_jax.models import arrays

OUTLINE = functools.cache(arrays.outline)  # takes 0.1 s each, most of the tests' time without the cache


@pytest.fixture(autouse=True)
def _outlines(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tilelli_jax.convert.plan", "tilelli_jax.convert.to_torch"):
        monkeypatch.setattr(f"{module}.outline", OUTLINE, raising=False)
