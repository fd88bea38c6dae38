"""Which tensor of a foreign checkpoint is which array of ours, declared once and used both ways.

A map says, for every array of a network by its dotted name, what the checkpoint calls it and how it
lies there. `{i}` stands for a number that both names have, as a layer's; `{h}` for one that only
the checkpoint has: its tensors 0, 1, … are then the slices of ours along the first axis.

    {"blocks.{i}.mlp.up.kernel": turned("layers.{i}.mlp.up_proj.weight"),
     "blocks.{i}.sparse.query.kernel": turned("blocks.{i}.sparse.heads.{h}.Wq.weight")}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.tensors import Tensor, check_fit

How = Literal["same", "turned", "taps", "fused heads", "one row"]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Theirs:
    """What a checkpoint calls an array, and how it lies there (`how`, a key of `LAYOUTS`)."""

    name: str
    how: How = "same"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of ours lies in a checkpoint; both directions undo one another."""

    meaning: str
    shape: Callable[[Shape], Shape]  # ours → theirs
    ours: Callable[[np.ndarray, Shape], np.ndarray]  # their array, our shape → our array
    theirs: Callable[[np.ndarray], np.ndarray]


def _heads_in(array: np.ndarray, shape: Shape) -> np.ndarray:
    heads, width, inner = shape
    return np.swapaxes(array.reshape(heads, inner, width), 1, 2)


LAYOUTS: dict[How, Layout] = {
    "same": Layout("as it is", lambda s: s, lambda a, _: a, lambda a: a),
    "turned": Layout("[…, out, in] → […, in, out]", lambda s: (*s[:-2], s[-1], s[-2]),
                     lambda a, _: np.swapaxes(a, -1, -2), lambda a: np.swapaxes(a, -1, -2)),
    "taps": Layout("[channels, 1, taps] → [taps, channels]", lambda s: (s[1], 1, s[0]),
                   lambda a, _: a[:, 0].T, lambda a: a.T[:, None]),
    "fused heads": Layout("[heads · out, in] → [heads, in, out]", lambda s: (s[0] * s[2], s[1]), _heads_in,
                          lambda a: np.swapaxes(a, 1, 2).reshape(-1, a.shape[1])),
    "one row": Layout("[1, 1, n] → [n]", lambda s: (1, 1, *s), lambda a, _: a[0, 0], lambda a: a[None, None])}


def turned(name: str) -> Theirs:
    """A kernel that is `[out, in]` there, as PyTorch has it, and `[in, out]` here."""
    return Theirs(name, "turned")


Names = Mapping[str, Theirs]


@dataclasses.dataclass(frozen=True)
class Link:
    """One array of ours and the tensors that it comes from: one, or one for each head."""

    ours: str
    theirs: tuple[str, ...]
    how: How
    shape: Shape  # ours
    by_head: bool

    @property
    def their_shape(self) -> Shape:
        """Of each of them."""
        return LAYOUTS[self.how].shape(self.shape[1:] if self.by_head else self.shape)


def link(names: Names, wanted: Mapping[str, Shape], source: str = "the map of names") -> list[Link]:
    """What the map says of every wanted array.

    Raises:
        InputError: it knows nothing of some of them; all such are listed.
    """
    unknown = [name for name in wanted if name not in names and numbered(name)[0] not in names]
    if unknown:
        raise InputError(f"{source}: nothing of such a checkpoint is known to be {', '.join(unknown)}")
    links = []
    for ours, shape in wanted.items():
        key, number = numbered(ours)
        place = names.get(ours) or names[key]
        name = place.name.replace("{i}", number)
        by_head = "{h}" in name
        parts = [name.replace("{h}", str(h)) for h in range(shape[0])] if by_head else [name]
        links.append(Link(ours, tuple(parts), place.how, shape, by_head))
    return links


def check(links: list[Link], found: Mapping[str, Shape], ignored: Mapping[str, str], source: str) -> None:
    """Holds what a checkpoint has against what is wanted of it.

    Args:
        found: their names and shapes.
        ignored: patterns of names that are not needed, with the reason.

    Raises:
        InputError: tensors are missing, left over or of another shape; all such are listed.
    """
    check_fit({name: link.their_shape for link in links for name in link.theirs}, found, source,
              lambda name: reason_to_ignore(name, ignored) is not None)


def reason_to_ignore(name: str, ignored: Mapping[str, str]) -> str | None:
    return next((reason for pattern, reason in ignored.items() if re.search(pattern, name)), None)


def to_ours(links: list[Link], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our arrays, read from theirs when they are asked for."""
    def ours(link: Link) -> Tensor:
        sources = [found[name] for name in link.theirs]
        layout = LAYOUTS[link.how]
        if len({source.dtype for source in sources}) > 1:
            raise InputError(f"{', '.join(link.theirs)}: expected tensors of one type")
        if link.how == "same" and not link.by_head:
            return sources[0]

        def parts() -> Iterator[np.ndarray]:
            for source in sources:
                if link.by_head:
                    yield layout.ours(source.read(), link.shape[1:])[None]
                else:
                    yield layout.ours(source.read(), link.shape)

        return Tensor(link.shape, sources[0].dtype, parts)

    return {link.ours: ours(link) for link in links}


def to_theirs(links: list[Link], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, read from our arrays when they are asked for; the inverse of `to_ours`."""
    def theirs(link: Link, head: int) -> Tensor:
        source, layout = found[link.ours], LAYOUTS[link.how]

        def parts() -> Iterator[np.ndarray]:
            array = source.read()
            yield layout.theirs(array[head] if link.by_head else array)

        return Tensor(link.their_shape, source.dtype, parts)

    return {name: theirs(link, head) for link in links for head, name in enumerate(link.theirs)}


def numbered(name: str) -> tuple[str, str]:
    """`blocks.3.norm.scale` → `blocks.{i}.norm.scale`, `3`."""
    number = re.search(r"\.(\d+)\.", name)
    return (name, "") if number is None else (name.replace(number[0], ".{i}.", 1), number[1])
