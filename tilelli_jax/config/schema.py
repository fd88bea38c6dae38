"""The schema of configurations: sections are frozen dataclasses, `setting` defines their keys."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from tilelli_jax.errors import InputError

DISCRIMINATOR = "family"
MAX_INTEGER = 2**31 - 1  # default limit of integers, as in JAX
LARGEST = sys.float_info.max
TYPE_NAMES: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text",
                              type(None): "null"}
ITEM_NAMES: dict[Any, str] = {int: "integers", float: "numbers", str: "texts"}
# Per bound: its symbol in errors and `--help`, and the comparison that a value must satisfy.
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "min": ("≥", operator.ge), "above": (">", operator.gt),
    "max": ("≤", operator.le), "below": ("<", operator.lt)}


def setting(default: Any, meaning: str, **bounds: float) -> Any:
    """Returns a dataclass field with a default and the meaning that `--help` prints.

    Args:
        bounds: bounds of a number: `min`, `above`, `max`, `below`. Without `max` or `below`, integers
            are at most 2³¹ − 1, as in JAX.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {"meaning": meaning, "bounds": bounds}
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base class of all sections: checks that numbers are finite and within their bounds.

    `load` checks types. A section constructed in Python is only checked for integers being integers. A
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
            cls: Any = type(self)
            if not kinds or (value is None and type(None) in options_of(hints_of(cls)[field.name])):
                continue
            whole = kinds[0] is int
            kind: Any = numbers.Integral if whole else numbers.Real
            if isinstance(value, kind) and not isinstance(value, int | float):  # NumPy's numbers
                value = int(value) if whole else float(value)
                object.__setattr__(self, field.name, value)
            fits = isinstance(value, kind) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
            if whole and fits and "max" not in bounds and value > MAX_INTEGER:
                bounds, fits = {**bounds, "max": MAX_INTEGER}, False
            if not (fits and all(BOUNDS[kind][1](value, bound) for kind, bound in bounds.items())):
                name = "an integer" if whole else "a number"
                raise InputError(f"{field.name}: expected {name}{format_bounds(bounds)}, found {value!r}")


@functools.cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The type of each field of a section."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union type; a single type as it is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def sections_of(hint: Any) -> list[Any]:
    """The sections among the members of a type."""
    return [option for option in options_of(hint) if dataclasses.is_dataclass(option)]


def default_of(cls: Any, name: str, default: Any) -> Any:
    """Returns the default of a section's key: as in `default` if that is such a section; None without one."""
    if type(default) is cls:
        return getattr(default, name)
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def mapping_of(hint: Any) -> Any:
    """Returns the type of the sections in a mapping, `dict[str, Section]`; None for another type."""
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None


def family_of(section: Any) -> str:
    """The value of the key that selects this section."""
    return typing.get_args(hints_of(section)[DISCRIMINATOR])[0]


def type_name(hint: Any) -> str:
    """Names a type in an error, e.g. "a number or null"."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return f"a list of {ITEM_NAMES.get(item) or type_name(item)}"
    return " or ".join(TYPE_NAMES.get(option) or
                       (type_name(option) if option is not hint else str(getattr(hint, "__name__", hint)))
                       for option in options_of(hint))


def short_type_name(hint: Any, bounds: Mapping[str, float]) -> str:
    """Names a type and its bounds in `--help`, e.g. "number > 0, or null" or "list of: a | b"."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of: {short_type_name(typing.get_args(hint)[0], bounds)}"
    options = options_of(hint)
    if len(options) == 1:
        name = TYPE_NAMES.get(hint) or str(getattr(hint, "__name__", hint))
        kind = name.removeprefix("an ").removeprefix("a ")
        return f"{kind} from {bounds['min']} to {bounds['max']}" if bounds.keys() == {"min", "max"} else (
            kind + format_bounds(bounds))
    kinds = [short_type_name(option, bounds) for option in options if option is not type(None)]
    return " or ".join(kinds) + ", or null" * (type(None) in options)


def format_bounds(bounds: Mapping[str, float]) -> str:
    """Formats bounds, e.g. " ≥ 0 and < 1"."""
    return " and".join(f" {BOUNDS[kind][0]} {bound}" for kind, bound in bounds.items())
