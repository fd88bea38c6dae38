"""Taps: the named places where values can be read from a network, or replaced in it.

A network offers its values at named places, `value = tap("router", value, seen)`. With the tap
`OFF` that is the value itself, and the compiled program is the same as without it. A tap made to
`record` some places puts their values into `seen`, which the network hands back with its result;
one made to `edit` a place goes on with what its function makes of the value: the base of patching.

    def silence(value, layer):                       # the writes of layer 3 become nothing
        return jnp.zeros_like(value) if layer == 3 else value

    tap = Tap(record=("resid_post",), layers=(3, 4), edit={"mlp_write": silence})
    logits, seen = nnx.jit(lambda model, ids: model.tapped(ids, tap))(model, ids)
    seen["resid_post"]                               # [2, batch, time, d_model]

Places, as far as a network has them:

    embed         what enters the first block           [batch, time, d_model]
    resid_pre     the residual stream before a block    likewise, for each layer
    attn_out      what attention adds to it
    cross_out     what a decoder's attention to the encoded text adds
    resid_mid     the stream between attention and feed-forward network
    mlp_write     what the feed-forward network adds
    router        the weights of pathways or experts    [batch, time, n]
    mix           what a routed block adds
    ple_write     what Gemma's embeddings of each layer add
    resid_post    the stream after a block
    hidden        the last stream, after the final norm [batch, time, d_model]
    abstain       the logit of an abstain head          [batch, time]
    logits                                              [batch, time, vocab]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Recorded = dict[str, jax.Array]
Edit = Callable[[jax.Array, int | None], jax.Array]  # value, layer (None outside the blocks) → value


@dataclasses.dataclass(frozen=True)
class Tap:
    """Which places to record or to edit. Arrays are those of the trace: use them in the same jit.

    Attributes:
        record: places to record, as they are after any edit.
        edit: a function for each place that is to be changed; its result has the value's shape.
        layers: of the places inside blocks, the layers to record; None for all.
        positions: int `[batch, n]`, the positions to record; None for all.
        layer: the block that offers its values, where it is known.
    """

    record: tuple[str, ...] = ()
    edit: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    positions: jax.Array | None = None
    layer: int | None = None

    def __call__(self, place: str, value: jax.Array, seen: Recorded) -> jax.Array:
        if place in self.edit:
            shape, value = value.shape, self.edit[place](value, self.layer)
            if jnp.shape(value) != shape:
                raise ValueError(f"tap: {place}: expected an edit to {list(shape)}, found "
                                 f"{list(jnp.shape(value))}")
        if place in self.record and (self.layer is None or self.layers is None or self.layer in self.layers):
            seen[place] = value if self.positions is None else _at(value, self.positions)
        return value

    @property
    def by_layer(self) -> bool:
        """Whether layers have to be told apart, so that they cannot be one scanned block."""
        return bool(self.edit) or self.layers is not None

    def check(self, places: Sequence[str], n_layers: int) -> None:
        """Raises ValueError where a network has no such place or layer."""
        if unknown := [place for place in (*self.record, *self.edit) if place not in places]:
            raise ValueError(f"tap: no place '{unknown[0]}' here; expected some of {', '.join(places)}")
        if outside := [i for i in self.layers or () if not 0 <= i < n_layers]:
            raise ValueError(f"tap: layers: expected 0 to {n_layers - 1}, found {outside[0]}")

    def within(self, layer: int) -> Tap:
        """The tap that a block is given."""
        return dataclasses.replace(self, layer=layer)


OFF = Tap()
TapOf = Callable[[Any, jax.Array], Tap]  # a second network (or None), `beside [rows, n]` → the tap


def stacked(records: Sequence[Recorded]) -> Recorded:
    """What each layer recorded, place by place, with a leading axis of the layers that did."""
    places = {place: None for record in records for place in record}  # in their order
    return {place: jnp.stack([record[place] for record in records if place in record]) for place in places}


def _at(value: jax.Array, positions: jax.Array) -> jax.Array:
    """`[batch, time, …]` at `[batch, n]`: `[batch, n, …]`."""
    if jnp.ndim(positions) != 2 or len(positions) != len(value) or (
            not jnp.issubdtype(jnp.result_type(positions), jnp.integer)):
        raise ValueError(f"tap: positions: expected whole numbers [{len(value)}, n], found "
                         f"{jnp.result_type(positions)} {list(jnp.shape(positions))}")
    if not isinstance(positions, jax.core.Tracer) and np.size(positions):
        known = np.asarray(positions)
        low, high = known.min(), known.max()
        if low < 0 or high >= value.shape[1]:
            raise ValueError(f"tap: positions: expected 0 to {value.shape[1] - 1}, "
                             f"found {low if low < 0 else high}")
    index = positions.reshape(*positions.shape, *(1,) * (value.ndim - 2))
    return jnp.take_along_axis(value, index, axis=1)
