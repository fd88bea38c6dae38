"""Stored references: what the original projects and transformers came to, beside the checkout.

Checkpoints, data and results of others are kept out of this project. A test that reads some says so with
`needs`; what it shows of them is shown on made-up cases, too, by tests that always run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

STORED = Path(__file__).parents[2] / "shared" / "reference"


def needs(path: Path) -> pytest.MarkDecorator:
    """Skips a test where a reference is not there."""
    name = path.relative_to(STORED.parents[1])
    return pytest.mark.skipif(not path.exists(), reason=(
        f"compares with results of the original projects, which are not part of this one: no {name}"))
