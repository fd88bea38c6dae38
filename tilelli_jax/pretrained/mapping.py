"""Name maps between our arrays and the tensors of other libraries' checkpoints, for both directions.

A map assigns to every array of a network, by its dotted name, the name of a tensor in the checkpoint and
its layout there. `{i}` is a number in both names, such as a layer index. `{h}` is a number only in the
checkpoint's name: tensors 0, 1, … are then the slices of our array along its first axis.

    {"blocks.{i}.mlp.up.kernel": transposed("layers.{i}.mlp.up_proj.weight"),
     "blocks.{i}.sparse.query.kernel": transposed("blocks.{i}.sparse.heads.{h}.Wq.weight")}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor, check_fit

How = Literal["same", "transposed", "taps", "fused heads", "one row"]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Theirs:
    """The name of an array in a checkpoint, and its layout there (`how`, a key of `LAYOUTS`)."""

    name: str
    how: How = "same"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of one of our arrays in a checkpoint; the two conversions are inverses."""

    meaning: str
    shape: Callable[[Shape], Shape]  # ours → theirs
    ours: Callable[[np.ndarray, Shape], np.ndarray]  # their array, our shape → our array
    theirs: Callable[[np.ndarray], np.ndarray]


def _heads_in(array: np.ndarray, shape: Shape) -> np.ndarray:
    heads, width, inner = shape
    return np.swapaxes(array.reshape(heads, inner, width), 1, 2)


LAYOUTS: dict[How, Layout] = {
    "same": Layout("unchanged", lambda s: s, lambda a, _: a, lambda a: a),
    "transposed": Layout("[…, out, in] → […, in, out]", lambda s: (*s[:-2], s[-1], s[-2]),
                     lambda a, _: np.swapaxes(a, -1, -2), lambda a: np.swapaxes(a, -1, -2)),
    "taps": Layout("[channels, 1, taps] → [taps, channels]", lambda s: (s[1], 1, s[0]),
                   lambda a, _: a[:, 0].T, lambda a: a.T[:, None]),
    "fused heads": Layout("[heads · out, in] → [heads, in, out]", lambda s: (s[0] * s[2], s[1]), _heads_in,
                          lambda a: np.swapaxes(a, 1, 2).reshape(-1, a.shape[1])),
    "one row": Layout("[1, 1, n] → [n]", lambda s: (1, 1, *s), lambda a, _: a[0, 0], lambda a: a[None, None])}


def transposed(name: str) -> Theirs:
    """A kernel that is `[out, in]` in the checkpoint, as in PyTorch, and `[in, out]` in our network."""
    return Theirs(name, "transposed")


Names = Mapping[str, Theirs]


@dataclasses.dataclass(frozen=True)
class Link:
    """One of our arrays and its tensors in the checkpoint: one, or one for each head."""

    ours: str
    theirs: tuple[str, ...]
    how: How
    shape: Shape  # ours
    by_head: bool

    @property
    def their_shape(self) -> Shape:
        """The shape of each tensor in the checkpoint."""
        return LAYOUTS[self.how].shape(self.shape[1:] if self.by_head else self.shape)


def link(names: Names, shapes: Mapping[str, Shape], source: str = "name map") -> list[Link]:
    """Links every array to its tensors in the checkpoint.

    Args:
        names: the name map.
        shapes: shapes of our arrays by name.

    Raises:
        InputError: the map lacks some of the arrays; all such are listed.
    """
    unknown = [name for name in shapes if name not in names and numbered(name)[0] not in names]
    if unknown:
        raise InputError(f"{source}: expected a tensor name for every array, found none for "
                         f"{', '.join(unknown)}")
    links = []
    for ours, shape in shapes.items():
        key, number = numbered(ours)
        theirs = names.get(ours) or names[key]
        name = theirs.name.replace("{i}", number)
        by_head = "{h}" in name
        parts = [name.replace("{h}", str(h)) for h in range(shape[0])] if by_head else [name]
        links.append(Link(ours, tuple(parts), theirs.how, shape, by_head))
    return links


def check(links: list[Link], found: Mapping[str, Shape], ignored: Mapping[str, str], source: str) -> None:
    """Compares the tensors of a checkpoint with those that the links require.

    Args:
        found: shapes of the checkpoint's tensors by name.
        ignored: patterns of names that are not needed, with the reason.

    Raises:
        InputError: tensors are missing, unknown or of another shape; all such are listed.
    """
    check_fit({name: link.their_shape for link in links for name in link.theirs}, found, source,
              lambda name: reason_to_ignore(name, ignored) is not None)


def reason_to_ignore(name: str, ignored: Mapping[str, str]) -> str | None:
    """Why a tensor is not needed; None if it is needed or unknown."""
    return next((reason for pattern, reason in ignored.items() if re.search(pattern, name)), None)


def to_ours(links: list[Link], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our arrays, read lazily from the checkpoint's tensors."""
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
    """The checkpoint's tensors, read lazily from our arrays; the inverse of `to_ours`."""
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
