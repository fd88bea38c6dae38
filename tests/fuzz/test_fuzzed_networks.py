"""Mutated model directories and checkpoints, given to every command that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.cases import Bases, check, check_valid_input, input_params, target_params
from tests.fuzz.networks import TARGETS
from tests.fuzz.running import Target


@pytest.mark.parametrize("target", target_params(TARGETS))
def test_valid_input(target: Target, bases: Bases, tmp_path: Path) -> None:
    check_valid_input(target, bases.get(target), tmp_path / "input")


@pytest.mark.parametrize(("target", "number"), input_params(TARGETS))
def test_mutated_input(target: Target, number: int, bases: Bases, tmp_path: Path) -> None:
    check(target, number, bases.get(target), tmp_path / "input")
