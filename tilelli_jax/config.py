"""Frozen dataclasses ⇄ YAML, with dotted overrides and errors that name the nearest key.

A section of the configuration is a frozen dataclass derived from `Section`. Its fields are made by
`setting`, which keeps what a key means and its bounds beside its default. This module knows no
section: every one stands in the file of what it configures (`RoutedConfig` in `models/routed.py`,
`MeshConfig` in `sharding.py`, …), and `training/experiment.py` joins them into what one run is.

A field may be a choice of sections, `RoutedConfig | VanillaConfig`; they are told apart by the
`Literal` that each of them has under `family`. One that may be nothing, `ChronosConfig | None`, is
nothing where the file says so or leaves it out.
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
EXPONENT = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"  # YAML 1.1 takes 1e-3 (no dot) for a string


WHOLE = 2**31 - 1
LARGEST = sys.float_info.max

# How a bound is written in errors and in `--help`, and when a value keeps it.
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "min": ("≥", operator.ge), "above": (">", operator.gt),
    "max": ("≤", operator.le), "below": ("<", operator.lt)}


def setting(default: Any, meaning: str, **bounds: float) -> Any:
    """A dataclass field with its default and the sentence that `--help` prints for it.

    Args:
        bounds: of a number: `min`, `above`, `max`, `below`. Whole numbers are at most 2³¹ − 1, as
            those of JAX are, unless this says otherwise.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {"meaning": meaning, "bounds": bounds}
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base of every section: its numbers are finite and within their settings' bounds.

    Types are `load`'s to check; of a section made in Python, only that whole numbers are whole.

    Raises:
        InputError: one is not. A section that checks more extends `__post_init__`.
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
            if whole and fits and "max" not in bounds and value > WHOLE:
                bounds, fits = {**bounds, "max": WHOLE}, False
            if not (fits and all(BOUNDS[kind][1](value, bound) for kind, bound in bounds.items())):
                name = "a whole number" if whole else "a number"
                raise InputError(f"{field.name}: expected {name}{_bounds(bounds)}, found {value!r}")


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file into the dataclass `cls`, then applies `key.sub=value` overrides.

    Raises:
        InputError: the file is missing or not YAML, or a key or a value is not the schema's.
    """
    tree: dict[str, Any] = _overridden(overrides, {} if path is None else read_yaml(path))
    source = "" if path is None else str(path)
    try:
        return from_dict(cls, tree, source)
    except InputError:
        if overrides:  # blame the file only for what is wrong without them
            from_dict(cls, {} if path is None else read_yaml(path), source)
            from_dict(cls, tree, "overrides")
        raise


def parse_overrides(overrides: Sequence[str], tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `key.sub=value` texts say, put into a tree of nested dicts.

    Raises:
        InputError: one is no such text.
    """
    def plain(value: Any) -> Any:
        if isinstance(value, _Typed):
            return value.value
        return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value
    return plain(_overridden(overrides, {} if tree is None else tree))


def from_dict(cls: type[T], tree: Mapping[str, Any], source: str = "") -> T:
    """Builds `cls` from nested mappings; `source` names the file in the errors.

    Raises:
        InputError: a key or a value is not the schema's; unknown keys are all named.
    """
    where = f"{source}: " if source else ""
    unknown = [f"'{key}'" + _instead(cls, section, key) for key, section in _unknown(cls, tree, "", where)]
    if unknown:
        raise InputError(f"{where}unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}")
    return _build(cls, tree, "", where)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts and lists, in field order, as YAML and JSON can hold them."""
    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value
    return plain(config)


def settings(config: Any) -> dict[str, Any]:
    """Dotted key → value, in field order."""
    return dict(_flatten(to_dict(config)))


def dump(config: Any) -> str:
    """The YAML text that `load` reads back into an equal object."""
    return yaml_text.dump(to_dict(config))


def describe(cls: type) -> str:
    """Every key of `cls`, a line each: dotted name, type, default, meaning."""
    rows = list(_describe(cls, ""))
    width = max(len(key) for key, _, _ in rows)
    return "\n".join(f"  {key:<{width}}  {kind}\n  {'':<{width}}    {meaning}"
                     for key, kind, meaning in rows)


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys on which two configurations differ, with both values."""
    left, right = settings(a), settings(b)
    keys = list(left) + [key for key in right if key not in left]
    return {key: (left.get(key), right.get(key)) for key in keys
            if left.get(key) != right.get(key)}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping.

    Raises:
        InputError: missing, unreadable, not YAML, or not a mapping.
    """
    return yaml_text.read(find(path))


def find(path: str | Path) -> Path:
    """The file that is meant by a path, or by the name of a configuration that is shipped: `demo`.

    Raises:
        InputError: there is neither.
    """
    path = Path(path)
    # A path wins. Of a link to nothing, reading it says what is wrong.
    if os.path.lexists(path) and not (path.is_dir() and str(path) in shipped()):
        return path
    if found := shipped().get(str(path)):
        return found
    beside = path.parent.glob("*.yaml") if path.parent.is_dir() else ()
    near = _nearest(path.name, (file.name for file in beside))
    near = str(path.with_name(near)) if near else _nearest(str(path), shipped())
    is_name = path.suffix == "" and path.parent == Path()
    raise InputError(f"{path}: no such file" + ", and no configuration of that name is shipped" * is_name
                     + _meant(near))


@functools.cache
def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name; none in a clone that is not installed."""
    try:
        found = importlib.resources.files("tilelli_jax.configs")
    except ModuleNotFoundError:
        return {}
    paths = [Path(str(entry)) for entry in found.iterdir()]
    return {path.stem: path for path in sorted(paths) if path.suffix == ".yaml"}


def command_line(prog: str, doc: str | None, cls: type, shipped_as: str, example: str) -> ArgumentParser:
    """The parser of a command that `cls` configures: --config, `key=value`, and every key in `--help`.

    A command adds its own options, and parses intermixed: overrides may stand between them.

    Args:
        shipped_as: the name of a configuration that is shipped for it.
        example: of an override.
    """
    parser = ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                            epilog=f"keys, with their defaults:\n{describe(cls)}")
    parser.add_argument("--config", required=True, metavar="FILE",
                        help=f"YAML file of settings, or the name of one that is shipped, as {shipped_as}")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help=f"settings that take precedence over the file's, e.g. {example}")
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
    except InputError as error:  # raised by a section's own __post_init__
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
        if found is not _NO:
            return found
    near = _nearest(str(value), typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ())
    raise InputError(f"{source}{key}: expected {_name(hint)}, found {yaml_text.kind(value)} {value!r:.200}"
                     + _meant(near))


def _choose(sections: list[Any], value: Any, key: str, source: str) -> Any:
    """The section among several that the discriminator names; the first where it names none."""
    if len(sections) == 1:
        return sections[0]
    names = {_family(section): section for section in sections}
    name = value.get(DISCRIMINATOR) if isinstance(value, Mapping) else None
    if name is None:
        return sections[0]
    if not isinstance(name, str) or name not in names:
        raise InputError(f"{source}{key}.{DISCRIMINATOR}: expected one of {', '.join(names)}, "
                         f"found {name!r}" + _meant(_nearest(str(name), names)))
    return names[name]


_NO = object()


def _scalar(hint: Any, value: Any, key: str, source: str) -> Any:
    """`value` as the type `hint`, or _NO where it is none."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        for choice in typing.get_args(hint):
            # YAML reads a bare `none` as a string and `no` as false: compare types as well.
            if type(choice) is type(value) and choice == value:
                return choice
        return _NO
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _NO
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{key}[{i}]", source) for i, v in enumerate(value))
    if hint is bool:
        return value if isinstance(value, bool) else _NO
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO
    if hint is float:
        if isinstance(value, str) and re.fullmatch(EXPONENT, value):
            return float(value)
        try:
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _NO
        except OverflowError:
            return _NO
    if hint is str:
        return value if isinstance(value, str) else _NO
    return _NO


class _Typed(NamedTuple):
    """The value of an override, and its text, which a key that takes text gets: `{question}`, `007`."""

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
    """The value of an override: YAML, or else the text itself (nothing at all, `*.txt`)."""
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
    """The likeliest of the known words to have been meant, or ""."""
    return next(iter(difflib.get_close_matches(word, map(str, known), n=1)), "")


def _bounds(bounds: Mapping[str, float]) -> str:
    """" ≥ 0 and < 1"."""
    return " and".join(f" {BOUNDS[kind][0]} {bound}" for kind, bound in bounds.items())


def _meant(near: str) -> str:
    return f"; did you mean '{near}'?" if near else ""


def _unknown(cls: Any, tree: Any, prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    """The dotted keys that are not the schema's, each with the section it stands in."""
    hints = _hints(cls)
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if key not in hints:
            yield f"{prefix}{key}", cls
        elif sections := _sections(hints[key]):
            value = value.value if isinstance(value, _Typed) else value
            section = _choose(sections, value, prefix + key, source)
            yield from _unknown(section, value, f"{prefix}{key}.", source)


def _instead(root: Any, section: Any, key: str) -> str:
    """What is to be said of an unknown key: what may have been meant."""
    prefix, dot, name = key.rpartition(".")
    known = [dotted for dotted, _, _ in _describe(root, "")]
    if key in known:  # of another section that could stand here
        return f" (not with {prefix}{dot}{DISCRIMINATOR} {_family(section)})"
    namesake = next((dotted for dotted in known if dotted.rpartition(".")[2] == name), "")
    near = _nearest(name, _hints(section))
    meant = namesake or (f"{prefix}{dot}{near}" if near else _nearest(key, known))
    return f" (did you mean '{meant}'?)" if meant else ""


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
            default = "" if field.default is dataclasses.MISSING else f" [{_shown(field.default)}]"
            yield (f"{prefix}{field.name}", _name(hint) + _bounds(field.metadata["bounds"]) + default,
                   field.metadata["meaning"])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "empty" if value == "" else "nothing" if value is None else str(value)
