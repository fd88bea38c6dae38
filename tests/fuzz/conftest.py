"""What the tests of spoilt inputs share: the directories that these are copies of."""

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
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is gone may stand for a data set of the hub, which nobody asks here."""
    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise ConnectionError("there is no network")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
