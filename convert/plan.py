"""What a conversion will do: the network's configuration, and which tensor becomes which array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convert.source import Source
from tilelli_jax import config as config_lib
from tilelli_jax.models.arrays import outline
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Link, Names, Shape
from tilelli_jax.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes:
        family: as the command line has it.
        config: of our network.
        links: our arrays and the tensors that they come from.
        names: the map that says so.
        found: the tensors, under the names that the links have.
        ignored: patterns of tensors that are not needed, with the reason.
        notes: what was assumed.
    """

    family: str
    config: Any
    links: list[Link]
    names: Names
    found: Mapping[str, Tensor]
    ignored: Mapping[str, str]
    notes: Sequence[str] = ()

    def check(self, source: str) -> None:
        """Raises InputError, which lists them, where tensors are missing, left over or of another shape."""
        mapping.check(self.links, {name: tensor.shape for name, tensor in self.found.items()}, self.ignored,
                      source)

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
        families: what our configuration says under `family`.
        to_torch: writes a model directory's arrays back; None where it is a Hugging Face family.
    """

    name: str
    families: tuple[str, ...]
    recognises: Callable[[Source], bool]
    plan: Callable[[Source, Mapping[str, Any]], Plan]


def make_plan(family: str, build: Callable[..., Any], config: Any, names: Names, found: Mapping[str, Tensor],
              ignored: Mapping[str, str], notes: Sequence[str] = ()) -> Plan:
    """The plan for a network whose arrays a map of names tells."""
    return Plan(family, config, mapping.link(names, shapes(build, config)), names, found, ignored, notes)


def shapes(build: Callable[..., Any], config: Any) -> dict[str, Shape]:
    """Names and shapes of all arrays of a network."""
    return {name: leaf.shape for name, leaf in outline(build, config).items()}


def configured(cls: type, said: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> Any:
    """The configuration that a source says, except where the settings say otherwise."""
    return config_lib.from_dict(cls, {**said, **settings}, source)
