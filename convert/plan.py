"""Conversion plans: the network's configuration, and which tensor becomes which array."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax.io.tensors import Tensor, check_floats
from tilelli_jax.models.arrays import abstract_arrays, check_sizes
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Link, Names, Shape

from .source import Source


@dataclasses.dataclass(frozen=True)
class Assumption:
    """A setting that the source does not specify; `--check` compares its possible values on text.

    Attributes:
        key: key in the network's configuration.
        value: the assumed value.
        others: the other possible values, at least one.
        why: sentence that states what the source does not specify, and what is assumed.
    """

    key: str
    value: Any
    others: Sequence[Any]
    why: str

    @property
    def note(self) -> str:
        """One line that reports the assumption and the option that changes it."""
        other = "the other" if len(self.others) == 1 else "others"
        return (f"{self.key}: {self.why} (--set {shlex.quote(as_override(self.key, self.others[-1]))} for "
                f"{other}; --check compares them on text)")


def as_override(key: str, value: Any) -> str:
    """Formats a setting as an argument of `--set`."""
    return f"{key}={value if isinstance(value, str) else '[' + ','.join(value) + ']'}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The conversion of one source.

    Attributes:
        family: name of the family, as on the command line.
        config: configuration of the resulting network.
        links: arrays of the network and the tensors that they are made from.
        names: the map of names that the links follow.
        tensors: the source's tensors, under the names that the links use.
        ignored: patterns of tensor names that are not converted, with the reason.
        assumptions: settings that the source does not specify.
        remarks: further notes for the user.
        original_names: name in the links → name in the file, for renamed tensors.
        tied_duplicates: tensors stored twice: name → name of the identical tensor.
    """

    family: str
    config: Any
    links: list[Link]
    names: Names
    tensors: Mapping[str, Tensor]
    ignored: Mapping[str, str]
    assumptions: Sequence[Assumption] = ()
    remarks: Sequence[str] = ()
    original_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied_duplicates: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Lines for the user: the assumptions, then the remarks."""
        return [*(assumption.note for assumption in self.assumptions), *self.remarks]

    def check(self, source: str) -> None:
        """Raises InputError if tensors are missing, unknown, of the wrong shape, or of integers."""
        mapping.check(self.links, {name: tensor.shape for name, tensor in self.tensors.items()}, self.ignored,
                      source)
        check_floats({name: self.tensors[name] for link in self.links for name in link.theirs}, source)

    def arrays(self) -> dict[str, Tensor]:
        """The arrays of the resulting network, read on access."""
        return mapping.to_ours(self.links, self.tensors)


@dataclasses.dataclass(frozen=True)
class SourceFamily:
    """One family of checkpoints.

    Attributes:
        name: name on the command line.
        recognises: whether a source belongs to this family.
        plan: makes the plan from a source and the texts `key=value` of `--set`, which override the source's
            own settings; may raise InputError.
    """

    name: str
    recognises: Callable[[Source], bool]
    plan: Callable[[Source, Sequence[str]], Plan]


def make_plan(family: str, build: Callable[..., Any], config: Any, names: Names, source: Source,
              ignored: Mapping[str, str], assumptions: Sequence[Assumption] = (),
              tied_duplicates: Mapping[str, str] | None = None) -> Plan:
    """Returns the plan for a network, a configuration and a map of names.

    Raises:
        InputError: the map lacks an array that the configuration requires.
    """
    check_sizes(config, {name: tensor.shape for name, tensor in source.tensors.items()}, str(source.path))
    links = mapping.link(names, shapes(build, config), str(source.path))
    remarks = [f"{key}: its tensors are not part of a network and are not converted"
               for key in source.ignored_keys]
    same = {name: f"tied: the same numbers as {other}" for name, other in (tied_duplicates or {}).items()}
    return Plan(family, config, links, names, source.tensors,
                {**ignored, **{f"^{re.escape(name)}$": reason for name, reason in same.items()}}, assumptions,
                remarks, source.original_names, tied_duplicates or {})


def shapes(build: Callable[..., Any], config: Any) -> dict[str, Shape]:
    """Names and shapes of all arrays of a network."""
    return {name: leaf.shape for name, leaf in abstract_arrays(build, config).items()}


def configured(cls: type, inferred: Mapping[str, Any], overrides: Sequence[str], source: str) -> Any:
    """Builds the configuration from the settings of a source, overridden by those of `--set`.

    Raises:
        InputError: a key or value is invalid; the error names its origin, `source` or `--set`.
    """
    return config_lib.overridden(cls, inferred, overrides, source, "--set")


def key_of(override: str) -> str:
    """Returns the key, or its section, that a text `key=value` or `section.key=value` sets."""
    return re.split("[.=]", override, maxsplit=1)[0]
