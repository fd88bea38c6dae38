"""The tests of mutated inputs: their parameters, the valid inputs, and the checks."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.running import Target, faults_of, mutate_copy, run_target


class Bases:
    """Creates each valid input once, in a separate directory."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self._paths: dict[Callable[[], None], Path] = {}

    def get(self, target: Target) -> Path:
        if target.make not in self._paths:
            path = self.parent / str(len(self._paths))
            path.mkdir()
            with contextlib.chdir(path), contextlib.redirect_stdout(io.StringIO()):
                target.make()
            self._paths[target.make] = path
        return self._paths[target.make]


def input_params(targets: Iterable[Target]) -> list[Any]:
    """Parameters of a test, one for every input of every target, all marked for `make test-all` only."""
    return [pytest.param(target, number, id=f"{target.name}, {number}", marks=pytest.mark.exhaustive)
            for target in targets for number in range(target.inputs)]


def target_params(targets: Iterable[Target]) -> list[Any]:
    """Parameters of a test, one for every target, all marked for `make test-all` only."""
    return [pytest.param(target, id=target.name, marks=pytest.mark.exhaustive) for target in targets]


def check(target: Target, number: int, base: Path, directory: Path) -> None:
    """Mutates an input, runs the command, and fails with a full report if the command has a fault."""
    mutation = mutate_copy(target, base, directory, number)
    outcome = run_target(target, directory)
    shutil.rmtree(directory)
    if faults := faults_of(target, outcome):
        lines = [f"{target.main.__module__} {target.argv}", f"input {number}: {mutation}", *faults,
                 f"status {outcome.status}, {outcome.seconds:.1f} s", outcome.err[:3000]]
        pytest.fail("\n".join(lines), pytrace=False)


def check_valid_input(target: Target, base: Path, directory: Path) -> None:
    """Fails if a command rejects its valid input, or rejects it with another error than the expected one."""
    shutil.copytree(base, directory, symlinks=True)
    outcome = run_target(target, directory)
    shutil.rmtree(directory)
    assert not faults_of(target, outcome), outcome
    assert outcome.status == (2 if target.expected_error else target.statuses[0]), outcome
    assert target.expected_error in outcome.err
