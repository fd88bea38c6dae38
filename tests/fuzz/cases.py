"""One test for each spoilt input, and the directories that they are copies of."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.running import Target, carry_out, complaints, spoil


class Bases:
    """Inputs that are not spoilt, each made once, in a directory of its own."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self._made: dict[Callable[[], None], Path] = {}

    def of(self, target: Target) -> Path:
        if target.make not in self._made:
            path = self.parent / str(len(self._made))
            path.mkdir()
            with contextlib.chdir(path), contextlib.redirect_stdout(io.StringIO()):
                target.make()
            self._made[target.make] = path
        return self._made[target.make]


def numbered(targets: Iterable[Target]) -> list[Any]:
    """As values of a parameter: every input of every target. All of them, and for `make test-all` alone."""
    return [pytest.param(target, number, id=f"{target.name}, {number}", marks=pytest.mark.exhaustive)
            for target in targets for number in range(target.inputs)]


def named(targets: Iterable[Target]) -> list[Any]:
    """As values of a parameter: every target, likewise."""
    return [pytest.param(target, id=target.name, marks=pytest.mark.exhaustive) for target in targets]


def check(target: Target, number: int, base: Path, place: Path) -> None:
    """Fails with all that there is to say about an input, where the command does not end as it should."""
    done = spoil(target, base, place, number)
    found = carry_out(target, place)
    shutil.rmtree(place)
    if said := complaints(target, found):
        pytest.fail(f"{target.main.__module__} {target.argv}\ninput {number}: {done}\n" + "\n".join(said)
                    + f"\nstatus {found.status}, {found.seconds:.1f} s\n{found.err[:3000]}", pytrace=False)


def check_unspoilt(target: Target, base: Path, place: Path) -> None:
    """Fails where a command does not take its input, or refuses it for another reason than it should."""
    shutil.copytree(base, place, symlinks=True)
    found = carry_out(target, place)
    shutil.rmtree(place)
    assert not complaints(target, found), found
    assert found.status == (2 if target.refused else target.statuses[0]), found
    assert target.refused in found.err
