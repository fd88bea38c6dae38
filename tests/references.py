"""Stored reference results of the original projects and transformers, in a directory outside the repository.

Checkpoints, data and results of other projects are not part of this one. A test that reads them is marked
with `needs`. Tests on synthetic cases, which always run, check the same properties.
"""

from __future__ import annotations

from pathlib import Path

import pytest

STORED = Path(__file__).parents[2] / "shared" / "reference"


def needs(path: Path) -> pytest.MarkDecorator:
    """Skips a test if the reference does not exist."""
    name = path.relative_to(STORED.parents[1])
    return pytest.mark.skipif(not path.exists(), reason=(
        f"compares with results of the original projects, which are not part of this repository: no {name}"))
