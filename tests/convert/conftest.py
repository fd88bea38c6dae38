"""Fixture for the conversion tests: caches the names and shapes of each network's arrays."""

from __future__ import annotations

import functools

import pytest

from tilelli_jax.models import arrays

CACHED = functools.cache(arrays.abstract_arrays)  # 0.1 s each: most of the tests' time without the cache


@pytest.fixture(autouse=True)
def _cached_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tilelli_jax.convert.plan", "tilelli_jax.convert.to_torch"):
        monkeypatch.setattr(f"{module}.abstract_arrays", CACHED, raising=False)
