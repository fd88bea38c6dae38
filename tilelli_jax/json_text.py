"""JSON of files as a library can use it: within limits, and its texts are whole."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilelli_jax import files
from tilelli_jax.errors import InputError

SURROGATE = re.compile("[\ud800-\udfff]")
MAX_DEPTH = 100  # levels of lists and objects
GIT_LFS = b"version https://git-lfs"  # how a pointer begins that stands for a large file


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        InputError: the file cannot be read, or is no JSON object.
    """
    tree = parse(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected an object, found {kind(tree)}")
    return tree


def read_text(path: Path) -> str:
    """As `files.read_text`, of a file that is no git-lfs pointer."""
    text = files.read_text(path)
    check_fetched(path, text[:len(GIT_LFS)].encode())
    return text


def check_fetched(path: Path, first: bytes) -> None:
    """Raises InputError where a file that begins so is a git-lfs pointer."""
    if first.startswith(GIT_LFS):
        raise InputError(f"{path}: is a git-lfs pointer, not the file; `git lfs pull` fetches that")


def object_under(tree: Mapping[str, Any], key: str, inside: str = "") -> dict[str, Any]:
    """The object under a key; an empty one where there is none, or null.

    Args:
        inside: what the tree is called, with a dot, for errors.

    Raises:
        InputError: something else is there.
    """
    found = tree.get(key)
    if not isinstance(found, dict | None):
        raise InputError(f"{inside}{key}: expected an object, found {kind(found)}")
    return found or {}


def lines(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """Of each line of a text that is not empty: its number, from 1 on, and what it holds.

    Raises:
        InputError: it is no JSON.
    """
    for number, line in enumerate(text.split("\n"), 1):  # not at other ends of lines, which texts may hold
        if line.strip():
            yield number, parse(line, f"{where}, line {number}")


def parse(text: str, where: str) -> Any:
    """What a text of JSON holds.

    Args:
        where: it is from, for errors.

    Raises:
        InputError: it is no JSON, is nested more than DEEPEST levels deep, or has half a character in it.
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
    """Raises InputError where a tree of JSON is too deep, or a text of it has half a character in it.

    A lone surrogate is such a half: JSON can say it (`"\\ud800"`), and no file, terminal or tokenizer takes
    it.
    """
    left, level = [tree], 0
    while left:
        if level > MAX_DEPTH:
            raise InputError(f"{where}: expected at most {MAX_DEPTH} levels, found more")
        left, level = list(_inside(left, where)), level + 1


@contextlib.contextmanager
def as_expected(path: Path) -> Iterator[None]:
    """Reading what we have written: a key that is missing and a value of another kind is an InputError."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}: expected it, found nothing") from None
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def kind(tree: Any) -> str:
    """What JSON calls a value; of one that JSON has not, Python's name for its type."""
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
            raise InputError(f"{where}: expected text, found half a character (a lone surrogate) in "
                             f"{tree!r:.40}")
