"""What the tests of spoilt inputs share: the directories that these are copies of."""

from __future__ import annotations

import pytest

from tests.fuzz.cases import Bases


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("fuzzed"))
