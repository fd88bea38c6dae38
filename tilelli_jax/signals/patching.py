"""Putting an autoencoder's reconstruction in the place of a network's activations, some latents left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.estimators.sae import Codes, TopKSAE
from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import Mesh
from tilelli_jax.signals.places import check_place
from tilelli_jax.signals.scoring import Text, score

NOTHING = -1  # no latent is left out
EVERYTHING = -2  # nothing is left, not even the decoder's bias


class Patch(NamedTuple):
    """What is patched in each row: positions `[start, stop)`, and the latent to leave out.

    That may be NOTHING or EVERYTHING. Each is int32 `[rows]`. A row whose span is empty goes through as it
    is.
    """

    start: jax.Array
    stop: jax.Array
    latent: jax.Array


def reconstructed(sae: TopKSAE, value: jax.Array, patch: Patch) -> jax.Array:
    """value `[rows, time, d_model]` with the patch's positions as the autoencoder has them, in f32 and back.

    The latent left out is set to 0 after those that are active have been chosen: no other takes its place.
    """
    codes = sae.encode(value.astype(jnp.float32))
    kept = codes.latents != patch.latent[:, None, None]
    made = sae.decode(Codes(jnp.where(kept, codes.values, 0.0), codes.latents))
    made = jnp.where(patch.latent[:, None, None] == EVERYTHING, 0.0, made)
    at = jnp.arange(value.shape[1])
    selected = (at >= patch.start[:, None]) & (at < patch.stop[:, None])
    return jnp.where(selected[..., None], made.astype(value.dtype), value)


def patching(sae: TopKSAE, place: str, layer: int, patch: Patch) -> Tap:
    """The tap that patches one place of one layer; the network must have them (see `check_place`)."""
    def edit(value: jax.Array, at: int | None) -> jax.Array:
        return reconstructed(sae, value, patch) if at == layer else value
    return Tap(edit={place: edit})


def check_patch(sae: TopKSAE, d_model: int, latents: Sequence[int]) -> None:
    """Raises ValueError where an autoencoder is of another width than a network, or has no such latent."""
    if sae.config.d_model != d_model:
        raise ValueError(f"sae: expected d_model {d_model}, found {sae.config.d_model}")
    for latent in latents:
        if latent not in (NOTHING, EVERYTHING) and not 0 <= latent < sae.config.n_latents:
            raise ValueError(f"latents: expected 0 to {sae.config.n_latents - 1}, found {latent}")


class Patched(NamedTuple):
    """Token ids, the first of those whose surprise counts, and the span of positions that is patched."""

    ids: Sequence[int]
    target: int
    start: int
    stop: int


def patched_nll(model: Any, sae: TopKSAE, texts: Sequence[Patched], latents: Sequence[int], *, place: str,
                 layer: int, batch_size: int = 16, mesh: Mesh | None = None) -> np.ndarray:
    """Mean surprise at each text's target as it is, reconstructed, and with each latent left out.

    Args:
        latents: NOTHING and EVERYTHING may be among them.

    Returns:
        `[texts, 2 + latents]`, f64, nats.

    Raises:
        ValueError: the network has no such place or layer, the autoencoder is of another width or has no such
            latent, or a text has nothing before its target.
    """
    check_place(model, place, layer)
    check_patch(sae, model.config.d_model, latents)
    for i, text in enumerate(texts):
        if not 1 <= text.target < len(text.ids):
            raise ValueError(f"target: text {i}: expected 1 to {len(text.ids) - 1}, found {text.target}")
    rows = [Text(text.ids, (text.start, text.stop if variant else text.start, latent))
            for text in texts for variant, latent in enumerate((NOTHING, NOTHING, *latents))]

    def tap_of(sae: Any, beside: jax.Array) -> Tap:
        return patching(sae, place, layer, Patch(beside[:, 0], beside[:, 1], beside[:, 2]))
    found = np.zeros(len(rows))
    for i, result in score(model, rows, tap_of, aux_model=sae, batch_size=batch_size, mesh=mesh, what="patching"):
        found[i] = result.nats[texts[i // (2 + len(latents))].target - 1:].mean(dtype=np.float64)
    return found.reshape(len(texts), -1)


class Spliced(NamedTuple):
    """Mean loss as the network is, with the reconstruction in its place, and with zeros there."""

    natural: float
    reconstructed: float
    zeroed: float

    @property
    def recovered(self) -> float:
        """How far the reconstruction goes from zeros (0) to the network as it is (1); may be below 0.

        NaN where zeros change nothing.
        """
        gap = self.zeroed - self.natural
        return (self.zeroed - self.reconstructed) / gap if gap else math.nan


def spliced(model: Any, sae: TopKSAE, texts: Sequence[Sequence[int]], *, place: str, layer: int,
            skip: int = 1, batch_size: int = 16, mesh: Mesh | None = None) -> Spliced:
    """The loss that an autoencoder recovers when the network goes on with what it makes of all positions.

    Args:
        texts: token ids, two at least of each.
        skip: leave the first positions as they are: `rows_of` does not show them to an autoencoder.
    """
    found = patched_nll(model, sae, [Patched(ids, 1, min(skip, len(ids)), len(ids)) for ids in texts],
                         [EVERYTHING], place=place, layer=layer, batch_size=batch_size, mesh=mesh)
    weights = np.array([len(ids) - 1 for ids in texts], float)
    return Spliced(*(float(weights @ column / weights.sum()) for column in found.T))
