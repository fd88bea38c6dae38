"""What a conversion will do: the network's configuration, and which tensor becomes which array."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax.models.arrays import check_sizes, outline
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Link, Names, Shape
from tilelli_jax.tensors import Tensor, check_floats

from .source import Source


@dataclasses.dataclass(frozen=True)
class Assumption:
    """A setting that a source leaves open; `--check` compares its values on text.

    Attributes:
        key: of the network's configuration.
        value: what is assumed.
        others: what it may be instead, at least one value.
        why: what the source does not say, and what is assumed.
    """

    key: str
    value: Any
    others: Sequence[Any]
    why: str

    @property
    def note(self) -> str:
        """One line, with the way to choose otherwise."""
        other = "the other" if len(self.others) == 1 else "others"
        return (f"{self.key}: {self.why} (--set {shlex.quote(as_override(self.key, self.others[-1]))} for "
                f"{other}; --check compares them on text)")


def as_override(key: str, value: Any) -> str:
    """A setting as `--set` reads it."""
    return f"{key}={value if isinstance(value, str) else '[' + ','.join(value) + ']'}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes:
        family: as the command line has it.
        config: of our network.
        links: our arrays and the tensors that they come from.
        names: the map that says so.
        found: the tensors, under the names that the links have.
        called: what the file calls those that were renamed.
        doubled: tensors that the file has twice: name → the name of the same.
        ignored: patterns of tensors that are not needed, with the reason.
        assumptions: what the source leaves open.
        remarks: what else is to be said of it.
    """

    family: str
    config: Any
    links: list[Link]
    names: Names
    found: Mapping[str, Tensor]
    ignored: Mapping[str, str]
    assumptions: Sequence[Assumption] = ()
    remarks: Sequence[str] = ()
    called: Mapping[str, str] = dataclasses.field(default_factory=dict)
    doubled: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What its user is to know, a line each."""
        return [*(assumption.note for assumption in self.assumptions), *self.remarks]

    def check(self, source: str) -> None:
        """Raises InputError where tensors are missing, left over, of another shape, or of whole numbers."""
        mapping.check(self.links, {name: tensor.shape for name, tensor in self.found.items()}, self.ignored,
                      source)
        check_floats({name: self.found[name] for link in self.links for name in link.theirs}, source)

    def arrays(self) -> dict[str, Tensor]:
        """Ours, to be read when they are asked for."""
        return mapping.to_ours(self.links, self.found)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        name: on the command line.
        recognises: whether a source is of this family.
        plan: what becomes of it, given settings (`--set`) that go before what it says itself; may
            raise InputError.
        to_torch: writes a model directory's arrays back; None where it is a Hugging Face family.
    """

    name: str
    recognises: Callable[[Source], bool]
    plan: Callable[[Source, Mapping[str, Any]], Plan]


def make_plan(family: str, build: Callable[..., Any], config: Any, names: Names, source: Source,
              ignored: Mapping[str, str], assumptions: Sequence[Assumption] = (),
              doubled: Mapping[str, str] | None = None) -> Plan:
    """The plan for a network whose arrays a map of names tells.

    Raises:
        InputError: the map knows nothing of an array that the configuration asks for.
    """
    check_sizes(config, {name: tensor.shape for name, tensor in source.tensors.items()}, str(source.path))
    links = mapping.link(names, shapes(build, config), str(source.path))
    remarks = [f"{key}: its tensors are no part of a network and stay behind" for key in source.left_behind]
    same = {name: f"the same numbers as {other}: tied" for name, other in (doubled or {}).items()}
    return Plan(family, config, links, names, source.tensors,
                {**ignored, **{f"^{re.escape(name)}$": reason for name, reason in same.items()}}, assumptions,
                remarks, source.called, doubled or {})


def shapes(build: Callable[..., Any], config: Any) -> dict[str, Shape]:
    """Names and shapes of all arrays of a network."""
    return {name: leaf.shape for name, leaf in outline(build, config).items()}


def configured(cls: type, said: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> Any:
    """The configuration that a source says, except where the settings say otherwise."""
    return config_lib.from_dict(cls, {**said, **settings}, source)
