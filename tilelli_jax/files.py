"""Writing files so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target and renames."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes all the files beside their targets, and renames when all of them are whole.

    Each is seen old or new. A machine that fails between two renames leaves some of both.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            written.append((Path(temporary), path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)
        for beside, path in written:
            os.replace(beside, path)
    except BaseException:
        for beside, _ in written:
            beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, tree: Any) -> None:
    """Indented JSON, atomically."""
    write_atomically(path, as_json(tree))


def as_json(tree: Any) -> bytes:
    """Indented JSON, UTF-8."""
    return json.dumps(tree, indent=2, ensure_ascii=False).encode() + b"\n"
