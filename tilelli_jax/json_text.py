"""JSON of files as a library can use it: objects whose texts are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tilelli_jax.errors import InputError

SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        InputError: the file cannot be read, or is no JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected an object")
    check_text(tree, str(path))
    return tree


def check_text(tree: Any, where: str) -> None:
    """Raises InputError where a text of a tree of JSON has half a character in it, a lone surrogate.

    JSON can say it (`"\\ud800"`), and no file, terminal or tokenizer takes it.
    """
    left = [tree]
    while left:
        one = left.pop()
        if isinstance(one, str):
            if not one.isascii() and SURROGATE.search(one):
                raise InputError(f"{where}: expected text, found half a character (a lone surrogate) in "
                                 f"{one!r:.40}")
        elif isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
