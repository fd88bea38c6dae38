"""Converts between frozen dataclasses and YAML, with dotted overrides and errors that name the nearest key.

A section of a configuration is a frozen dataclass derived from `Section`. `setting` defines its fields, each
with a default, a meaning and bounds. Each section is defined next to the code that it configures
(`RoutedConfig` in `models/routed.py`, `MeshConfig` in `sharding.py`, …); `training/experiment.py` combines
them into the configuration of a training run.

A field may be a choice of sections, `RoutedConfig | VanillaConfig`; the `Literal` that each has under
`family` distinguishes them. An optional section, `ChronosConfig | None`, is None if the file sets it to null
or omits it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib.resources
import numbers
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tilelli_jax import yaml_text
from tilelli_jax.errors import ArgumentParser, InputError

T = TypeVar("T")
DISCRIMINATOR = "family"
EXPONENT = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"  # YAML 1.1 parses 1e-3 (no dot) as a string


MAX_WHOLE_NUMBER = 2**31 - 1  # default limit of whole numbers, as in JAX
LARGEST = sys.float_info.max

# Per bound: its symbol in errors and `--help`, and the comparison that a value must satisfy.
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "min": ("≥", operator.ge), "above": (">", operator.gt),
    "max": ("≤", operator.le), "below": ("<", operator.lt)}


def setting(default: Any, meaning: str, **bounds: float) -> Any:
    """Returns a dataclass field with a default and the meaning that `--help` prints.

    Args:
        bounds: bounds of a number: `min`, `above`, `max`, `below`. Without `max` or `below`, whole numbers
            are at most 2³¹ − 1, as in JAX.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {"meaning": meaning, "bounds": bounds}
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base class of all sections: checks that numbers are finite and within their bounds.

    `load` checks types. A section constructed in Python is only checked for whole numbers being whole. A
    section with further checks extends `__post_init__`.

    Raises:
        InputError: a number is not finite, not whole or out of bounds.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value: Any = getattr(self, field.name)
            bounds = field.metadata["bounds"]
            kinds = [type(number) for number in (field.default, value)
                     if isinstance(number, int | float) and not isinstance(number, bool)]
            if not kinds:
                continue
            whole = kinds[0] is int
            kind: Any = numbers.Integral if whole else numbers.Real
            if isinstance(value, kind) and not isinstance(value, int | float):  # NumPy's numbers
                value = int(value) if whole else float(value)
                object.__setattr__(self, field.name, value)
            fits = isinstance(value, kind) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
            if whole and fits and "max" not in bounds and value > MAX_WHOLE_NUMBER:
                bounds, fits = {**bounds, "max": MAX_WHOLE_NUMBER}, False
            if not (fits and all(BOUNDS[kind][1](value, bound) for kind, bound in bounds.items())):
                name = "a whole number" if whole else "a number"
                raise InputError(f"{field.name}: expected {name}{_bounds(bounds)}, found {value!r}")


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file into the dataclass `cls`, then applies `key.sub=value` overrides.

    Raises:
        InputError: the file is missing or not YAML, or a key or value does not match the schema.
    """
    tree: dict[str, Any] = _overridden(overrides, {} if path is None else read_yaml(path))
    source = "" if path is None else str(path)
    try:
        return from_dict(cls, tree, source)
    except InputError:
        if overrides:  # blame the file only if it is wrong without the overrides
            from_dict(cls, {} if path is None else read_yaml(path), source)
            from_dict(cls, tree, "overrides")
        raise


def parse_overrides(overrides: Sequence[str], tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parses `key.sub=value` texts into a tree of nested dicts.

    Raises:
        InputError: a text does not have this form.
    """
    def plain(value: Any) -> Any:
        if isinstance(value, _Typed):
            return value.value
        return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value
    return plain(_overridden(overrides, {} if tree is None else tree))


def from_dict(cls: type[T], tree: Mapping[str, Any], source: str = "") -> T:
    """Builds `cls` from nested mappings; `source` names the file in the errors.

    Raises:
        InputError: a key or value does not match the schema; all unknown keys are named.
    """
    where = f"{source}: " if source else ""
    unknown = [f"'{key}'" + _suggestion(cls, section, key) for key, section in _unknown(cls, tree, "", where)]
    if unknown:
        raise InputError(f"{where}unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}")
    return _build(cls, tree, "", where)


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a configuration to nested dicts and lists, in field order, for YAML and JSON."""
    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value
    return plain(config)


def settings(config: Any) -> dict[str, Any]:
    """Returns dotted key → value, in field order."""
    return dict(_flatten(to_dict(config)))


def dump(config: Any) -> str:
    """Returns the YAML text that `load` reads back into an equal object."""
    return yaml_text.dump(to_dict(config))


def describe(cls: type) -> str:
    """Returns the help text: dotted name, type, default and meaning of every key of `cls`."""
    rows = list(_describe(cls, ""))
    width = max(len(key) for key, _, _ in rows)
    return "\n".join(f"  {key:<{width}}  {kind}\n  {'':<{width}}    {meaning}"
                     for key, kind, meaning in rows)


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys in which two configurations differ, with both values."""
    left, right = settings(a), settings(b)
    keys = list(left) + [key for key in right if key not in left]
    return {key: (left.get(key), right.get(key)) for key in keys
            if left.get(key) != right.get(key)}


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
    near = _nearest(path.name, (file.name for file in siblings))
    near = str(path.with_name(near)) if near else _nearest(str(path), shipped())
    is_name = path.suffix == "" and path.parent == Path()
    raise InputError(f"{path}: no such file" + ", and no configuration of that name is shipped" * is_name
                     + _did_you_mean(near))


@functools.cache
def shipped() -> dict[str, Path]:
    """Returns the configurations shipped with the package, by name; none in a clone that is not installed."""
    try:
        folder = importlib.resources.files("tilelli_jax.configs")
    except ModuleNotFoundError:
        return {}
    paths = [Path(str(entry)) for entry in folder.iterdir()]
    return {path.stem: path for path in sorted(paths) if path.suffix == ".yaml"}


def command_line(prog: str, doc: str | None, cls: type, shipped_as: str, example: str) -> ArgumentParser:
    """Returns the parser of a command configured by `cls`: --config, `key=value`, and all keys in `--help`.

    A command adds its own options and uses `parse_intermixed_args`, so that overrides may come between
    options.

    Args:
        shipped_as: name of a shipped configuration, as an example for --config.
        example: an example override.
    """
    parser = ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                            epilog=f"keys, with their defaults:\n{describe(cls)}")
    parser.add_argument("--config", required=True, metavar="FILE",
                        help=f"YAML file of settings, or the name of a shipped one, e.g. {shipped_as}")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help=f"settings that override the file's, e.g. {example}")
    return parser


# ---------------------------------------------------------------------------------------------


def _build(cls: Any, tree: Any, prefix: str, source: str) -> Any:
    if not isinstance(tree, Mapping):
        raise InputError(f"{source}{prefix.rstrip('.') or 'the file'}: expected keys with values, "
                         f"found {yaml_text.kind(tree)}")
    hints = _hints(cls)
    values = {key: _convert(hints[key], value, prefix + key, source) for key, value in tree.items()}
    try:
        return cls(**values)
    except InputError as error:  # from the section's __post_init__
        raise InputError(f"{source}{prefix}{error}") from None


def _convert(hint: Any, value: Any, key: str, source: str) -> Any:
    options, sections = _options(hint), _sections(hint)
    if isinstance(value, _Typed):
        value = value.text if hint is str else value.value
    if sections and not (value is None and type(None) in options):
        tree = {} if value is None else value  # an empty section has all its defaults
        return _build(_choose(sections, tree, key, source), tree, key + ".", source)
    if value is None:
        if type(None) in options:
            return None
        raise InputError(f"{source}{key}: expected {_name(hint)}, found nothing")
    for option in options:
        found = _scalar(option, value, key, source)
        if found is not _NO_MATCH:
            return found
    near = _nearest(str(value), typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ())
    raise InputError(f"{source}{key}: expected {_name(hint)}, found {yaml_text.kind(value)} {value!r:.200}"
                     + _did_you_mean(near))


def _choose(sections: list[Any], value: Any, key: str, source: str) -> Any:
    """Returns the section that the discriminator names; the first if there is no discriminator."""
    if len(sections) == 1:
        return sections[0]
    names = {_family(section): section for section in sections}
    name = value.get(DISCRIMINATOR) if isinstance(value, Mapping) else None
    if name is None:
        return sections[0]
    if not isinstance(name, str) or name not in names:
        raise InputError(f"{source}{key}.{DISCRIMINATOR}: expected one of {', '.join(names)}, "
                         f"found {name!r}" + _did_you_mean(_nearest(str(name), names)))
    return names[name]


_NO_MATCH = object()


def _scalar(hint: Any, value: Any, key: str, source: str) -> Any:
    """Converts `value` to the type `hint`; returns _NO_MATCH if it does not fit."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        for choice in typing.get_args(hint):
            # YAML reads a bare `none` as a string and `no` as false: compare types as well.
            if type(choice) is type(value) and choice == value:
                return choice
        return _NO_MATCH
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _NO_MATCH
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{key}[{i}]", source) for i, v in enumerate(value))
    if hint is bool:
        return value if isinstance(value, bool) else _NO_MATCH
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO_MATCH
    if hint is float:
        if isinstance(value, str) and re.fullmatch(EXPONENT, value):
            return float(value)
        try:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return float(value) if is_number else _NO_MATCH
        except OverflowError:
            return _NO_MATCH
    if hint is str:
        return value if isinstance(value, str) else _NO_MATCH
    return _NO_MATCH


class _Typed(NamedTuple):
    """An override's value, and its text, which is used for keys of type text: `{question}`, `007`."""

    value: Any
    text: str


def _overridden(overrides: Sequence[str], tree: dict[str, Any]) -> dict[str, Any]:
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
    return value if isinstance(value, str) or value is None else _Typed(value, text)


def _assign(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        if isinstance(tree[key], _Typed):
            tree[key] = tree[key].value
        tree = tree[key]
        if not isinstance(tree, dict):
            raise InputError(f"override '{override}': '{key}' holds a value, not keys")
    tree[keys[-1]] = value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _sections(hint: Any) -> list[Any]:
    return [option for option in _options(hint) if dataclasses.is_dataclass(option)]


def _family(section: Any) -> str:
    return typing.get_args(_hints(section)[DISCRIMINATOR])[0]


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_name(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
             type(None): "nothing"}
    return " or ".join(names.get(option) or
                       (_name(option) if option is not hint else str(getattr(hint, "__name__", hint)))
                       for option in _options(hint))


def _nearest(word: str, known: Iterable[Any]) -> str:
    """Returns the known word most similar to `word`, or ""."""
    return next(iter(difflib.get_close_matches(word, map(str, known), n=1)), "")


def _bounds(bounds: Mapping[str, float]) -> str:
    """Formats bounds, e.g. " ≥ 0 and < 1"."""
    return " and".join(f" {BOUNDS[kind][0]} {bound}" for kind, bound in bounds.items())


def _did_you_mean(near: str) -> str:
    return f"; did you mean '{near}'?" if near else ""


def _unknown(cls: Any, tree: Any, prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys that the schema lacks, each with its section."""
    hints = _hints(cls)
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if key not in hints:
            yield f"{prefix}{key}", cls
        elif sections := _sections(hints[key]):
            value = value.value if isinstance(value, _Typed) else value
            section = _choose(sections, value, prefix + key, source)
            yield from _unknown(section, value, f"{prefix}{key}.", source)


def _suggestion(root: Any, section: Any, key: str) -> str:
    """Returns the hint for an unknown key: the key that may have been meant."""
    prefix, dot, name = key.rpartition(".")
    known = [dotted for dotted, _, _ in _describe(root, "")]
    if key in known:  # a key of another family
        return f" (not with {prefix}{dot}{DISCRIMINATOR} {_family(section)})"
    namesake = next((dotted for dotted in known if dotted.rpartition(".")[2] == name), "")
    near = _nearest(name, _hints(section))
    likely = namesake or (f"{prefix}{dot}{near}" if near else _nearest(key, known))
    return f" (did you mean '{likely}'?)" if likely else ""


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _describe(cls: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    for field in dataclasses.fields(cls):
        hint = _hints(cls)[field.name]
        sections = _sections(hint)
        for section in sections:
            if len(sections) > 1:
                yield (f"{prefix}{field.name}", f"with {DISCRIMINATOR}: {_family(section)}",
                       str(section.__doc__).splitlines()[0])
            yield from _describe(section, f"{prefix}{field.name}.")
        if not sections:
            default = "" if field.default is dataclasses.MISSING else f" [{_format_default(field.default)}]"
            yield (f"{prefix}{field.name}", _name(hint) + _bounds(field.metadata["bounds"]) + default,
                   field.metadata["meaning"])


def _format_default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "empty" if value == "" else "nothing" if value is None else str(value)
