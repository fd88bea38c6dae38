"""Reads and writes YAML within limits; duplicate keys are errors, and dates are read as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tilelli_jax.errors import InputError
from tilelli_jax.io import files
from tilelli_jax.io.json_text import MAX_DEPTH, check_text

MAX_BYTES = 1 << 20  # size limit of a file: PyYAML reads about 100 kB per second
MAX_VALUES = 100_000  # aliases repeat values: nine lines can expand to a billion values
TOO_LARGE = f"expected at most {MAX_DEPTH} levels and {MAX_VALUES:,} values, found more"


def read(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping.

    Raises:
        InputError: the file is unreadable, not YAML, or not a mapping.
    """
    try:
        tree = parse(files.read_text(path, MAX_BYTES))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected keys with values, found {kind(tree)}")
    check_text(tree, str(path))
    return tree


def parse(text: str) -> Any:
    """Parses YAML into dicts, lists and scalars; creates no other objects.

    Raises:
        ValueError: the text is not YAML; the message says what is wrong and where, in one line.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(problem + (f" (line {mark.line + 1})" if mark else "")) from None
    except RecursionError:
        raise ValueError(TOO_LARGE) from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # A value does not match its tag, as in `!!bool maybe`.
        raise ValueError(f"a value does not match its tag: {error}") from None
    _check_size(tree)
    return tree


def kind(tree: Any) -> str:
    """Names a value's type in the user's terms."""
    return {dict: "keys", list: "a list", str: "text", bool: "a boolean", int: "an integer",
            float: "a number", type(None): "null"}.get(type(tree), type(tree).__name__)


def dump(tree: Mapping[str, Any]) -> str:
    """Returns the text that `parse` reads back, with keys in their order."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _check_size(tree: Any) -> None:
    """Raises ValueError if the tree, aliases expanded, is too large or deep or has other types of values."""
    values, level, count = [tree], 0, 0
    while values:
        count += len(values)
        if level > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(TOO_LARGE)
        inside: list[Any] = []
        for value in values:
            if isinstance(value, dict | list):
                inside += [*value, *value.values()] if isinstance(value, dict) else value
                if len(inside) > MAX_VALUES:
                    break
            elif not isinstance(value, str | int | float | None):
                raise ValueError(f"expected text, numbers, lists and keys with values, found {value!r:.40}")
        values, level = inside, level + 1


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Before PyYAML 6.0.4 a merge (<<) of aliases repeats their keys, exponentially.
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=TOO_LARGE, problem_mark=node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # The standard requires unique keys; PyYAML silently takes the last one.
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice",
                                               problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}


class _Dumper(yaml.SafeDumper):
    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Without quotes, these rarer line breaks would be read back as spaces.
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
