"""What the tests of every study do to run one and to look at what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write(path: Path, tree: dict[str, Any]) -> str:
    """A configuration, as --config takes it."""
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def stage(out: Path, name: str) -> Path:
    """The one directory of a stage."""
    found, = (out / "stages").glob(f"{name}-*")
    return found
