"""What the tests of conversions share: the outline of a network is worked out once."""

from __future__ import annotations

import functools

import pytest

from tilelli_jax.models import arrays

OUTLINE = functools.cache(arrays.outline)  # a tenth of a second each, which would be most of the time


@pytest.fixture(autouse=True)
def _outlines(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tilelli_jax.convert.plan", "tilelli_jax.convert.to_torch"):
        monkeypatch.setattr(f"{module}.outline", OUTLINE, raising=False)
