"""Fixtures of the tests of mutated inputs: the valid inputs, and no network access."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from tests.fuzz.cases import Bases


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("fuzzed"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejects data sets of the Hugging Face hub, which a mutated configuration may request."""
    def reject(*arguments: Any, **options: Any) -> NoReturn:
        raise ConnectionError("there is no network")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=reject))
