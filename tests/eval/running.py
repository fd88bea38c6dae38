"""What the tests of every study do to run one and to look at what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml


def draws(few: int, many: int) -> pytest.MarkDecorator:
    """The argument `n` of a test of what chance does: few repetitions, and many in the exhaustive tests."""
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.exhaustive)])


def write(path: Path, tree: dict[str, Any]) -> str:
    """A configuration, as --config takes it."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def stage(out: Path, name: str) -> Path:
    """The one directory of a stage."""
    found, = (out / "stages").glob(f"{name}-*")
    return found
