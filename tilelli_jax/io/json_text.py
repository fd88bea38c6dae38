"""Reads JSON within limits of size and depth, and rejects texts with lone surrogates."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io import files

SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DEPTH = 100  # maximum nesting of lists and objects
GIT_LFS = b"version https://git-lfs"  # start of a git-lfs pointer file


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose top level is an object.

    Raises:
        InputError: the file is unreadable or not a JSON object.
    """
    tree = parse(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected an object, found {kind(tree)}")
    return tree


def read_text(path: Path) -> str:
    """Reads a text file like `files.read_text`; raises InputError also for a git-lfs pointer."""
    text = files.read_text(path)
    check_fetched(path, text[:len(GIT_LFS)].encode())
    return text


def check_fetched(path: Path, first: bytes) -> None:
    """Raises InputError if a file's first bytes are those of a git-lfs pointer."""
    if first.startswith(GIT_LFS):
        raise InputError(f"{path}: is a git-lfs pointer, not the file; `git lfs pull` fetches that")


def object_under(tree: Mapping[str, Any], key: str, inside: str = "") -> dict[str, Any]:
    """Returns the object under a key; an empty one if the key is missing or null.

    Args:
        inside: the tree's key with a final dot, for errors.

    Raises:
        InputError: the value is not an object.
    """
    value = tree.get(key)
    if not isinstance(value, dict | None):
        raise InputError(f"{inside}{key}: expected an object, found {kind(value)}")
    return value or {}


def lines(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """Yields the number, from 1, and the JSON value of each non-empty line.

    Raises:
        InputError: a line is not JSON.
    """
    for number, line in enumerate(text.split("\n"), 1):  # not at other line breaks, which texts may contain
        if line.strip():
            yield number, parse(line, f"{where}, line {number}")


def parse(text: str, where: str) -> Any:
    """Parses JSON.

    Args:
        where: the text's location, for errors.

    Raises:
        InputError: the text is not JSON, is nested more than MAX_DEPTH levels deep, or has a lone surrogate.
    """
    try:
        tree = json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: expected at most {MAX_DEPTH} levels, found more") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    check_text(tree, where)
    return tree


def check_text(tree: Any, where: str) -> None:
    """Raises InputError if a JSON tree is nested too deeply or one of its texts has a lone surrogate.

    JSON can express a lone surrogate (`"\\ud800"`), half of a character, which no file, terminal or tokenizer
    accepts.
    """
    values, level = [tree], 0
    while values:
        if level > MAX_DEPTH:
            raise InputError(f"{where}: expected at most {MAX_DEPTH} levels, found more")
        values, level = list(_inside(values, where)), level + 1


@contextlib.contextmanager
def as_expected(path: Path) -> Iterator[None]:
    """Turns errors from a missing key or a wrong type, while reading our own files, into InputError."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}: expected a value, found nothing") from None
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def kind(tree: Any) -> str:
    """Returns the JSON name of a value's type; for other values, Python's type name."""
    for types, name in ((dict, "an object"), (list, "a list"), (str, "text"), (bool, "true or false"),
                        (int | float, "a number")):
        if isinstance(tree, types):
            return name
    return "null" if tree is None else f"a {type(tree).__name__}"


def _inside(trees: list[Any], where: str) -> Iterator[Any]:
    for tree in trees:
        if isinstance(tree, dict):
            yield from tree
            yield from tree.values()
        elif isinstance(tree, list | tuple):
            yield from tree
        elif isinstance(tree, str) and not tree.isascii() and SURROGATE.search(tree):
            raise InputError(f"{where}: expected text, found a lone surrogate in "
                             f"{tree!r:.40}")
