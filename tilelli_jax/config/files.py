"""Reads configurations: YAML files, shipped ones by name, and `key.sub=value` overrides."""

from __future__ import annotations

import copy
import functools
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax.config.tree import T, Typed, did_you_mean, from_dict, nearest
from tilelli_jax.errors import InputError
from tilelli_jax.io import yaml_text


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file into the dataclass `cls`, then applies `key.sub=value` overrides.

    Raises:
        InputError: the file is missing or not YAML, or a key or value does not match the schema.
    """
    tree = {} if path is None else read_yaml(path)
    return overridden(cls, tree, overrides, "" if path is None else str(path))


def overridden(cls: type[T], tree: Mapping[str, Any], overrides: Sequence[str], source: str,
               option: str = "overrides") -> T:
    """Builds `cls` from nested mappings, after `key.sub=value` overrides of their keys.

    Args:
        tree: the mappings; unchanged.
        overrides: texts `key.sub=value`; each value is read as YAML, or kept as typed if its key is of text.
        source: names the origin of `tree` in errors.
        option: names the overrides in errors.

    Raises:
        InputError: a key or value does not match the schema, or an override does not have this form. An error
            that `tree` has without the overrides names `source`, any other names `option`.
    """
    changed = _apply(overrides, copy.deepcopy(dict(tree)))
    try:
        return from_dict(cls, changed, source)
    except InputError as error:
        if overrides and str(error) != _error_of(cls, tree, source):
            from_dict(cls, changed, option)
        raise


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping.

    Raises:
        InputError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    return yaml_text.read(find(path))


def find(path: str | Path) -> Path:
    """Returns the file of a path, or of a shipped configuration's name such as `demo`.

    Raises:
        InputError: neither exists.
    """
    path = Path(path)
    # A path has priority. For a dangling link, reading it gives the error.
    if os.path.lexists(path) and not (path.is_dir() and str(path) in shipped()):
        return path
    if found := shipped().get(str(path)):
        return found
    siblings = path.parent.glob("*.yaml") if path.parent.is_dir() else ()
    near = nearest(path.name, (file.name for file in siblings))
    near = str(path.with_name(near)) if near else nearest(str(path), shipped())
    is_name = path.suffix == "" and path.parent == Path()
    raise InputError(f"{path}: no such file" + ", and no configuration of that name is shipped" * is_name
                     + did_you_mean(near))


@functools.cache
def shipped() -> dict[str, Path]:
    """Returns the configurations shipped with the package, by name; none in a clone that is not installed."""
    try:
        folder = importlib.resources.files("tilelli_jax.configs")
    except ModuleNotFoundError:
        return {}
    paths = [Path(str(entry)) for entry in folder.iterdir()]
    return {path.stem: path for path in sorted(paths) if path.suffix == ".yaml"}


def _error_of(cls: type, tree: Mapping[str, Any], source: str) -> str:
    try:
        from_dict(cls, tree, source)
    except InputError as error:
        return str(error)
    return ""


def _apply(overrides: Sequence[str], tree: dict[str, Any]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"override '{override}': expected key.subkey=value")
        _assign(tree, key.split("."), _override(text), override)
    return tree


def _override(text: str) -> Any:
    """Parses an override's value as YAML; returns the text if it is empty or not YAML, like `*.txt`."""
    try:
        value = yaml_text.parse(text) if text else ""
    except ValueError:
        return text
    return value if isinstance(value, str) or value is None else Typed(value, text)


def _assign(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        if isinstance(tree[key], Typed):
            tree[key] = tree[key].value
        tree = tree[key]
        if not isinstance(tree, dict):
            raise InputError(f"override '{override}': '{key}' holds a value, not keys")
    tree[keys[-1]] = value
