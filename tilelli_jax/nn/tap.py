"""Taps: hooks that record or replace a network's activations at named places (hook points).

A network calls its tap at each place, `value = tap("router", value, recorded)`. The tap `OFF` returns
the value unchanged, and the compiled program is the same as without it. A tap that records places
stores their activations in `recorded`, which the network returns with its result. A tap that edits a
place replaces the activation by the result of its function; activation patching uses this.

    def ablate(value, layer):                        # zeroes the MLP writes of layer 3
        return jnp.zeros_like(value) if layer == 3 else value

    tap = Tap(record=("resid_post",), layers=(3, 4), edit={"mlp_write": ablate})
    logits, recorded = nnx.jit(lambda model, ids: model.tapped(ids, tap))(model, ids)
    recorded["resid_post"]                           # [2, batch, time, d_model]

Places; each network has some of them:

    embed         input of the first block              [batch, time, d_model]
    resid_pre     residual stream before a block        [batch, time, d_model] for each layer
    attn_out      output of attention, added to the stream
    cross_out     output of a decoder's attention to the encoded text
    resid_mid     residual stream between attention and MLP
    mlp_write     MLP write: output of the feed-forward network, added to the stream
    router        weights of pathways or experts        [batch, time, n] for each layer
    mix           output of a routed block, added to the stream
    ple_write     output of Gemma's per-layer embeddings, added to the stream
    resid_post    residual stream after a block
    hidden        last residual stream after the final norm  [batch, time, d_model]
    abstain       logit of an abstain head              [batch, time]
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
    """Which places to record or edit. Recorded arrays belong to the trace: use them in the same jit.

    Attributes:
        record: places to record, after any edit.
        edit: place → function of (value, layer) whose result replaces the value; it has the same shape.
        layers: layers to record, for places inside the blocks; None for all.
        positions: int `[batch, n]`, positions to record; None for all.
        layer: the block that currently calls the tap; None outside the blocks or in a scanned block.
    """

    record: tuple[str, ...] = ()
    edit: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    positions: jax.Array | None = None
    layer: int | None = None

    def __call__(self, place: str, value: jax.Array, recorded: Recorded) -> jax.Array:
        if place in self.edit:
            shape, value = value.shape, self.edit[place](value, self.layer)
            if jnp.shape(value) != shape:
                raise ValueError(f"tap: {place}: expected an edit to {list(shape)}, found "
                                 f"{list(jnp.shape(value))}")
        if place in self.record and (self.layer is None or self.layers is None or self.layer in self.layers):
            recorded[place] = value if self.positions is None else _at(value, self.positions)
        return value

    @property
    def by_layer(self) -> bool:
        """Whether the tap distinguishes layers, so that they cannot run as one scanned block."""
        return bool(self.edit) or self.layers is not None

    def check(self, places: Sequence[str], n_layers: int) -> None:
        """Raises ValueError if the network lacks one of the places or layers."""
        if unknown := [place for place in (*self.record, *self.edit) if place not in places]:
            raise ValueError(f"tap: expected places among {', '.join(places)}, found '{unknown[0]}'")
        if outside := [i for i in self.layers or () if not 0 <= i < n_layers]:
            raise ValueError(f"tap: layers: expected 0 to {n_layers - 1}, found {outside[0]}")

    def within(self, layer: int) -> Tap:
        """The tap for one block."""
        return dataclasses.replace(self, layer=layer)


OFF = Tap()
TapOf = Callable[[Any, jax.Array], Tap]  # auxiliary network (or None), `metadata [rows, n]` → the tap


def stacked(records: Sequence[Recorded]) -> Recorded:
    """Stacks the layers' recordings: each place gets a leading axis of the layers that recorded it."""
    places = {place: None for record in records for place in record}  # in order of first occurrence
    return {place: jnp.stack([record[place] for record in records if place in record]) for place in places}


def _at(value: jax.Array, positions: jax.Array) -> jax.Array:
    """Selects positions `[batch, n]` of `[batch, time, …]`: `[batch, n, …]`."""
    if jnp.ndim(positions) != 2 or len(positions) != len(value) or (
            not jnp.issubdtype(jnp.result_type(positions), jnp.integer)):
        raise ValueError(f"tap: positions: expected whole numbers [{len(value)}, n], found "
                         f"{jnp.result_type(positions)} {list(jnp.shape(positions))}")
    if not isinstance(positions, jax.core.Tracer) and np.size(positions):
        concrete = np.asarray(positions)
        low, high = concrete.min(), concrete.max()
        if low < 0 or high >= value.shape[1]:
            raise ValueError(f"tap: positions: expected 0 to {value.shape[1] - 1}, "
                             f"found {low if low < 0 else high}")
    index = positions.reshape(*positions.shape, *(1,) * (value.ndim - 2))
    return jnp.take_along_axis(value, index, axis=1)
