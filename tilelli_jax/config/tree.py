"""Converts between sections and nested mappings, with errors that name the nearest key."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from tilelli_jax.config.help import describe_keys
from tilelli_jax.config.schema import (
    DISCRIMINATOR,
    default_of,
    family_of,
    hints_of,
    mapping_of,
    options_of,
    sections_of,
    type_name,
)
from tilelli_jax.errors import InputError
from tilelli_jax.io import yaml_text

T = TypeVar("T")
# Other names of settings, for suggestions.
SYNONYMS = {"lr": "learning_rate", "epochs": "steps", "iterations": "steps", "max_steps": "steps",
            "batch": "batch_size", "block_size": "max_seq_len", "context": "max_seq_len",
            "hidden_size": "d_model", "dim": "d_model", "layers": "n_layers", "heads": "n_heads"}
EXPONENT = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"  # YAML 1.1 parses 1e-3 (no dot) as a string


class Typed(NamedTuple):
    """An override's value, and its text, which is used for keys of type text: `{question}`, `007`."""

    value: Any
    text: str


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
        if isinstance(value, dict):
            return {name: plain(section) for name, section in value.items()}
        return list(value) if isinstance(value, tuple) else value
    return plain(config)


def settings(config: Any) -> dict[str, Any]:
    """Returns dotted key → value, in field order."""
    return dict(_flatten(to_dict(config)))


def dump(config: Any) -> str:
    """Returns the YAML text that `load` reads back into an equal object."""
    return yaml_text.dump(to_dict(config))


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys in which two configurations differ, with both values."""
    left, right = settings(a), settings(b)
    keys = list(left) + [key for key in right if key not in left]
    return {key: (left.get(key), right.get(key)) for key in keys
            if left.get(key) != right.get(key)}


def nearest(word: str, known: Iterable[Any]) -> str:
    """Returns the known word most similar to `word`, or ""."""
    return next(iter(difflib.get_close_matches(word, map(str, known), n=1)), "")


def did_you_mean(near: str) -> str:
    """The end of an error message that suggests `near`; empty if there is none."""
    return f"; did you mean '{near}'?" if near else ""


def _build(cls: Any, tree: Any, prefix: str, source: str, default: Any = None) -> Any:
    """Builds a section; keys that the tree lacks are as in `default`, if that is such a section."""
    if not isinstance(tree, Mapping):
        raise InputError(f"{source}{prefix.rstrip('.') or 'the file'}: expected keys with values, "
                         f"found {yaml_text.kind(tree)}")
    hints = hints_of(cls)
    values = {key: _convert(hints[key], value, prefix + key, source, default_of(cls, key, default))
              for key, value in tree.items()}
    try:
        return dataclasses.replace(default, **values) if type(default) is cls else cls(**values)
    except InputError as error:  # from the section's __post_init__
        raise InputError(f"{source}{prefix}{error}") from None


def _convert(hint: Any, value: Any, key: str, source: str, default: Any = None) -> Any:
    options, sections = options_of(hint), sections_of(hint)
    if isinstance(value, Typed):
        value = value.text if hint is str else value.value
    if (section := mapping_of(hint)) is not None:
        tree = {} if value is None else value
        return {name: _convert(section, inner, f"{key}.{name}", source)
                for name, inner in _items(tree, key, source)}
    if sections and not (value is None and type(None) in options):
        tree = {} if value is None else value  # an empty section has all its defaults
        return _build(_choose(sections, tree, key, source), tree, key + ".", source, default)
    if value is None:
        if type(None) in options:
            return None
        raise InputError(f"{source}{key}: expected {type_name(hint)}, found null")
    for option in options:
        found = _scalar(option, value, key, source)
        if found is not _NO_MATCH:
            return found
    near = nearest(str(value), typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ())
    raise InputError(f"{source}{key}: expected {type_name(hint)}, "
                     f"found {yaml_text.kind(value)} {value!r:.200}" + did_you_mean(near))


def _items(tree: Any, key: str, source: str) -> Iterable[tuple[str, Any]]:
    """Returns the names and sections of a mapping."""
    if not isinstance(tree, Mapping):
        raise InputError(f"{source}{key}: expected names with a section each, found {yaml_text.kind(tree)}")
    for name in tree:
        if not (isinstance(name, str) and name and "." not in name):  # a dot separates keys in overrides
            raise InputError(f"{source}{key}: expected names that are text without dots, found {name!r:.40}")
    return tree.items()


def _choose(sections: list[Any], value: Any, key: str, source: str) -> Any:
    """Returns the section that the discriminator names; the first if there is no discriminator."""
    if len(sections) == 1:
        return sections[0]
    names = {family_of(section): section for section in sections}
    name = value.get(DISCRIMINATOR) if isinstance(value, Mapping) else None
    if name is None:
        return sections[0]
    if not isinstance(name, str) or name not in names:
        raise InputError(f"{source}{key}.{DISCRIMINATOR}: expected one of {', '.join(names)}, "
                         f"found {name!r}" + did_you_mean(nearest(str(name), names)))
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


def _unknown(cls: Any, tree: Any, prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys that the schema lacks, each with its section."""
    hints = hints_of(cls)
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if key not in hints:
            yield f"{prefix}{key}", cls
            continue
        hint, trees = hints[key], {prefix + key: _untyped(value)}
        if (in_mapping := mapping_of(hint)) is not None:
            hint, mapping = in_mapping, _untyped(value)
            trees = {f"{prefix}{key}.{name}": _untyped(section) for name, section in (
                mapping.items() if isinstance(mapping, Mapping) else ())}
        for dotted, section_tree in trees.items() if (sections := sections_of(hint)) else ():
            section = _choose(sections, section_tree, dotted, source)
            yield from _unknown(section, section_tree, f"{dotted}.", source)


def _untyped(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def _suggestion(root: Any, section: Any, key: str) -> str:
    """Returns the hint for an unknown key: the key that may have been meant."""
    prefix, dot, name = key.rpartition(".")
    known = [dotted for dotted, _, _ in describe_keys(root, "")]
    if key in known:  # a key of another family
        return f" (not with {prefix}{dot}{DISCRIMINATOR} {family_of(section)})"
    name = SYNONYMS.get(name, name)
    namesakes = [dotted for dotted in known if dotted.rpartition(".")[2] == name]
    near = nearest(name, hints_of(section))
    likely = next(iter(namesakes), "") or (f"{prefix}{dot}{near}" if near else nearest(key, known))
    if name and not nearest(name, [likely.rpartition(".")[2]]):  # only the section is similar
        likely = ""
    return f" (did you mean '{likely}'?)" if likely else ""


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
