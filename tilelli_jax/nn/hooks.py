"""Hooks: named points of a network at which a tap records or replaces the activations.

A network calls its tap at each hook, `value = tap("router", value, recorded)`. The tap `OFF` returns
the value unchanged, and the compiled program is the same as without it. A tap that records hooks
stores their activations in `recorded`, which the network returns with its result. A tap that edits a
hook replaces the activation by the result of its function; activation patching uses this.

    def ablate(value, layer):                        # zeroes the MLP writes of layer 3
        return jnp.zeros_like(value) if layer == 3 else value

    tap = Tap(record=("resid_post",), layers=(3, 4), edit={"mlp_write": ablate})
    logits, recorded = nnx.jit(lambda model, ids: model.tapped(ids, tap))(model, ids)
    recorded["resid_post"]                           # [2, batch, time, d_model]

The hooks; each network has some of them (`model.hooks`):

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

OUTSIDE = ("embed", "hidden", "abstain", "logits")  # hooks outside the blocks, which have no layer
Recorded = dict[str, jax.Array]
Edit = Callable[[jax.Array, int | None], jax.Array]  # value, layer (None outside the blocks) → value


@dataclasses.dataclass(frozen=True)
class Tap:
    """Which hooks to record or edit. Recorded arrays belong to the trace: use them in the same jit.

    Attributes:
        record: hooks to record, after any edit.
        edit: hook → function of (value, layer) whose result replaces the value; it has the same shape.
        layers: layers to record, for hooks inside the blocks; None for all.
        positions: int `[batch, n]`, positions to record; None for all.
        layer: the block that currently calls the tap; None outside the blocks or in a scanned block.
    """

    record: tuple[str, ...] = ()
    edit: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    positions: jax.Array | None = None
    layer: int | None = None

    def __call__(self, hook: str, value: jax.Array, recorded: Recorded) -> jax.Array:
        if hook in self.edit:
            shape, value = value.shape, self.edit[hook](value, self.layer)
            if jnp.shape(value) != shape:
                raise ValueError(f"tap: {hook}: expected an edit to {list(shape)}, found "
                                 f"{list(jnp.shape(value))}")
        if hook in self.record and (self.layer is None or self.layers is None or self.layer in self.layers):
            recorded[hook] = value if self.positions is None else _at(value, self.positions)
        return value

    @property
    def by_layer(self) -> bool:
        """Whether the tap distinguishes layers, so that they cannot run as one scanned block."""
        return bool(self.edit) or self.layers is not None

    def check(self, hooks: Sequence[str], n_layers: int) -> None:
        """Raises ValueError if the network lacks one of the hooks or layers."""
        if unknown := [hook for hook in (*self.record, *self.edit) if hook not in hooks]:
            raise ValueError(f"tap: expected hooks among {', '.join(hooks)}, found '{unknown[0]}'")
        if outside := [i for i in self.layers or () if not 0 <= i < n_layers]:
            raise ValueError(f"tap: layers: expected 0 to {n_layers - 1}, found {outside[0]}")

    def within(self, layer: int) -> Tap:
        """The tap for one block."""
        return dataclasses.replace(self, layer=layer)


OFF = Tap()
MakeTap = Callable[[Any, jax.Array], Tap]  # auxiliary network (or None), `metadata [rows, n]` → the tap


def stacked(records: Sequence[Recorded]) -> Recorded:
    """Stacks the layers' recordings: each hook gets a leading axis of the layers that recorded it."""
    hooks = {hook: None for record in records for hook in record}  # in order of first occurrence
    return {hook: jnp.stack([record[hook] for record in records if hook in record]) for hook in hooks}


def check_hook(model: Any, hook: str, layer: int, allowed: Sequence[str] | None = None) -> None:
    """Raises ValueError if a network has no such hook inside its blocks, or no such layer.

    Args:
        allowed: accepted hooks; by default all hooks of the network.
    """
    inside = [name for name in allowed or model.hooks if name not in OUTSIDE]
    if hook not in inside:
        raise ValueError(f"hook: expected one of {', '.join(inside)}, found '{hook}'")
    config = model.config
    n_layers = config.n_decoder_layers if hook.startswith("decoder.") else config.n_layers
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer: expected 0 to {n_layers - 1}, found {layer}")


def _at(value: jax.Array, positions: jax.Array) -> jax.Array:
    """Selects positions `[batch, n]` of `[batch, time, …]`: `[batch, n, …]`."""
    if jnp.ndim(positions) != 2 or len(positions) != len(value) or (
            not jnp.issubdtype(jnp.result_type(positions), jnp.integer)):
        raise ValueError(f"tap: positions: expected integers [{len(value)}, n], found "
                         f"{jnp.result_type(positions)} {list(jnp.shape(positions))}")
    if not isinstance(positions, jax.core.Tracer) and np.size(positions):
        concrete = np.asarray(positions)
        low, high = concrete.min(), concrete.max()
        if low < 0 or high >= value.shape[1]:
            raise ValueError(f"tap: positions: expected 0 to {value.shape[1] - 1}, "
                             f"found {low if low < 0 else high}")
    index = positions.reshape(*positions.shape, *(1,) * (value.ndim - 2))
    return jnp.take_along_axis(value, index, axis=1)
