"""Activation patching: replaces activations by an autoencoder's reconstruction, with or without a latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.estimators.sae import TopKSAE
from tilelli_jax.nn.hooks import Tap, check_hook
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.signals.scoring import Text, score

NOTHING = -1  # ablate no latent
EVERYTHING = -2  # replace the activation by zeros; the decoder's bias is ablated too


class Patch(NamedTuple):
    """The patch of each row: positions `[start, stop)` and the ablated latent, NOTHING or EVERYTHING.

    Each is int32 `[rows]`. A row with an empty span is unchanged.
    """

    start: jax.Array
    stop: jax.Array
    latent: jax.Array


def reconstructed(sae: TopKSAE, value: jax.Array, patch: Patch) -> jax.Array:
    """value `[rows, time, d_model]` with the patch's positions replaced by their reconstruction.

    The autoencoder computes in f32; the result has the type of value. The ablated latent is set to 0 after
    the active latents are selected, so that no other latent replaces it.
    """
    codes = sae.encode(value.astype(jnp.float32))
    intact = codes.latents != patch.latent[:, None, None]
    reconstruction = sae.decode(codes._replace(values=jnp.where(intact, codes.values, 0.0)))
    reconstruction = jnp.where(patch.latent[:, None, None] == EVERYTHING, 0.0, reconstruction)
    positions = jnp.arange(value.shape[1])
    selected = (positions >= patch.start[:, None]) & (positions < patch.stop[:, None])
    return jnp.where(selected[..., None], reconstruction.astype(value.dtype), value)


def patching(sae: TopKSAE, hook: str, layer: int, patch: Patch) -> Tap:
    """The tap that patches one hook of one layer. The network must have both (see `check_hook`)."""
    def edit(value: jax.Array, at_layer: int | None) -> jax.Array:
        return reconstructed(sae, value, patch) if at_layer == layer else value
    return Tap(edit={hook: edit})


def check_patch(sae: TopKSAE, d_model: int, latents: Sequence[int]) -> None:
    """Raises ValueError if an autoencoder's width differs from the network's, or it lacks a latent."""
    if sae.config.d_model != d_model:
        raise ValueError(f"sae: expected d_model {d_model}, found {sae.config.d_model}")
    for latent in latents:
        if latent not in (NOTHING, EVERYTHING) and not 0 <= latent < sae.config.n_latents:
            raise ValueError(f"latents: expected 0 to {sae.config.n_latents - 1}, found {latent}")


class PatchedText(NamedTuple):
    """Token ids, the first token whose NLL is measured, and the span `[start, stop)` of patched positions."""

    ids: Sequence[int]
    target: int
    start: int
    stop: int


def patched_nll(model: Any, sae: TopKSAE, texts: Sequence[PatchedText], latents: Sequence[int], *, hook: str,
                layer: int, batch_size: int = 16, mesh: Mesh | None = None) -> np.ndarray:
    """Mean NLL of each text's target tokens: unpatched, reconstructed, and with each latent ablated.

    Args:
        latents: latents to ablate; may include NOTHING and EVERYTHING.

    Returns:
        `[texts, 2 + latents]`, f64, in nats per token.

    Raises:
        ValueError: the network has no such hook or layer, the autoencoder has another width or no such
            latent, or a text has no token before its target.
    """
    check_hook(model, hook, layer)
    check_patch(sae, model.config.d_model, latents)
    for i, text in enumerate(texts):
        if not 1 <= text.target < len(text.ids):
            raise ValueError(f"target: text {i}: expected 1 to {len(text.ids) - 1}, found {text.target}")
    rows = [Text(text.ids, (text.start, text.stop if variant else text.start, latent))
            for text in texts for variant, latent in enumerate((NOTHING, NOTHING, *latents))]

    def make_tap(sae: Any, metadata: jax.Array) -> Tap:
        return patching(sae, hook, layer, Patch(metadata[:, 0], metadata[:, 1], metadata[:, 2]))
    means = np.zeros(len(rows))
    for i, result in score(model, rows, make_tap, aux_model=sae, batch_size=batch_size, mesh=mesh,
                           label="patching"):
        means[i] = result.nll[texts[i // (2 + len(latents))].target - 1:].mean(dtype=np.float64)
    return means.reshape(len(texts), -1)


class PatchedLoss(NamedTuple):
    """Mean NLL (nats per token): unpatched, with reconstructed activations, and with zeroed activations."""

    natural: float
    reconstructed: float
    zeroed: float

    @property
    def recovered(self) -> float:
        """Fraction of the loss recovered: 0 is the zeroed loss, 1 the natural loss; may be below 0.

        NaN if zeroing does not increase the loss: there is then nothing to recover.
        """
        gap = self.zeroed - self.natural
        return (self.zeroed - self.reconstructed) / gap if gap > 0 else math.nan


def patched_loss(model: Any, sae: TopKSAE, texts: Sequence[Sequence[int]], *, hook: str, layer: int,
                 skip: int = 1, batch_size: int = 16, mesh: Mesh | None = None) -> PatchedLoss:
    """Measures the loss recovered by an autoencoder: its reconstruction replaces all positions.

    Args:
        texts: token ids, at least two of each.
        skip: number of first positions that stay unpatched; `activation_rows` excludes them from training.
    """
    losses = patched_nll(model, sae, [PatchedText(ids, 1, min(skip, len(ids)), len(ids)) for ids in texts],
                         [EVERYTHING], hook=hook, layer=layer, batch_size=batch_size, mesh=mesh)
    weights = np.array([len(ids) - 1 for ids in texts], float)
    return PatchedLoss(*(float(weights @ column / weights.sum()) for column in losses.T))
