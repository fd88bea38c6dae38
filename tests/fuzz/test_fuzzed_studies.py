"""Spoilt inputs, stages and results of studies, through every command that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.cases import Bases, check, check_unspoilt, named, numbered
from tests.fuzz.running import Target
from tests.fuzz.studies import TARGETS


@pytest.mark.parametrize("target", named(TARGETS))
def test_an_input_that_is_whole(target: Target, bases: Bases, tmp_path: Path) -> None:
    check_unspoilt(target, bases.of(target), tmp_path / "place")


@pytest.mark.parametrize(("target", "number"), numbered(TARGETS))
def test_a_spoilt_input(target: Target, number: int, bases: Bases, tmp_path: Path) -> None:
    check(target, number, bases.of(target), tmp_path / "place")
