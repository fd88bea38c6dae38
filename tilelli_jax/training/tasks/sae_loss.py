"""The loss of sparse autoencoders and the constraints on their updates (Gao et al. 2024).

The defaults follow current practice: the decoder's rows have length 1, gradients along them are removed,
losses are fractions of the variance, and dead latents learn to predict the residual (AuxK).
Nested prefixes of the dictionary (Matryoshka) follow Bussmann et al. 2025, arXiv:2503.17547.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import Codes, SAEConfig, TopKSAE, unit
from tilelli_jax.nn.sparse_codes import largest_of_all
from tilelli_jax.training.loss import Batch, Loss, Metrics

TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class SAELossConfig(Section):
    """The loss of a sparse autoencoder."""

    normalize: bool = setting(
        True, "divide losses by the batch's variance, and scale the auxiliary loss with the number of dead "
        "latents up to aux_k; false: plain mean squared errors")
    project_gradients: bool = setting(
        True, "remove the component of the decoder's gradient that changes the lengths of its rows")
    bias_init: Literal["geometric_median", "mean", "zero"] = setting(
        "geometric_median", "initial decoder bias: a centre of up to 16384 training rows, or zero")
    aux_weight: float = setting(1 / 32, "weight of the auxiliary loss", min=0)
    aux_k: int = setting(
        0, "maximum number of dead latents that predict a row's residual; 0: half of d_model", min=0)
    dead_after: int = setting(
        0, "training activations without firing after which a latent counts as dead; 0: a million, or a "
        "tenth of the run if that is less", min=0)
    k_start: int = setting(0, "active latents per row in the first update; 0: k from the start", min=0)
    k_steps: int = setting(1000, "updates in which k_start falls to k, linearly", min=1)
    prefixes: tuple[int, ...] = setting(
        (), "Matryoshka: sizes of dictionary prefixes that must also reconstruct alone; the loss is the mean "
        "over these and the whole dictionary; empty: none")
    threshold_decay: float = setting(
        0.99, "decay of batch_topk's threshold, a moving average of each batch's smallest active value",
        min=0, below=1)


class AutoencoderLoss(Loss):
    """The loss of an autoencoder, and the constraints on its updates.

    batch_topk selects its rows · k largest values over all devices, separately for each part of an
    accumulated batch.

    Batch: `activations [rows, d_model]`, and from `extra_batch` `dead` bool `[n_latents]` and `k` int32.
    Metrics: `loss` (the reconstruction loss over all prefixes), `mse`, `fvu`, `l0`, `auxiliary`, and after
    an update `dead`, the fraction of dead latents, and for batch_topk `threshold`.
    Loss state: `silent` int32 `[n_latents]`, activations since a latent was last active.

    Raises:
        InputError: the autoencoder is of a kind that cannot be trained; the prefixes are not increasing, or
            one is not below the number of latents.
    """

    def __init__(self, config: SAEConfig, objective: SAELossConfig, *, batch_size: int, steps: int):
        for key, kinds in (("activation", ("topk", "batch_topk")), ("input_norm", ("none",))):
            if getattr(config, key) not in kinds:
                raise InputError(f"model.{key}: expected {' or '.join(kinds)}, which can be trained, found "
                                 f"{getattr(config, key)}")
        sizes = (0, *objective.prefixes, config.n_latents)
        if any(size >= following for size, following in itertools.pairwise(sizes)):
            raise InputError(f"sae.prefixes: expected increasing numbers from 1 to below n_latents "
                             f"{config.n_latents}, found {', '.join(map(str, objective.prefixes))}")
        self.config, self.objective, self.batch_size = config, objective, batch_size
        self.k_first = max(config.k, min(objective.k_start, config.n_latents))
        self.n_codes = max(self.k_first, config.n_codes)
        self.aux_k = min(objective.aux_k or max(1, config.d_model // 2), config.n_latents)
        self.dead_after = objective.dead_after or min(10**6, max(1, batch_size * steps // 10))

    def __call__(self, model: TopKSAE, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # no randomness
        objective = self.objective
        x = batch["activations"].astype(jnp.float32)
        codes = model.encode(x, self.n_codes)
        if model.threshold is None:
            values = jnp.where(jnp.arange(self.n_codes) < batch["k"], codes.values, 0.0)
        else:
            values = largest_of_all(codes.values, batch["k"])
        residual = x - model.decode(Codes(values, codes.latents))
        mse = jnp.mean(residual**2)
        alone = [jnp.where(codes.latents < size, values, 0.0) for size in objective.prefixes]
        nested = [jnp.mean((x - model.decode(Codes(first, codes.latents)))**2) for first in alone]
        variance = _variance(x) + TINY
        auxiliary = self._auxiliary(model, x, jax.lax.stop_gradient(residual), batch["dead"])
        fired = jnp.zeros(self.config.n_latents).at[codes.latents].max(jnp.where(values > 0, 1.0, 0.0))
        main = sum(nested, mse) / (1 + len(nested)) / (variance if objective.normalize else 1)
        smallest = jnp.min(jnp.where(values > 0, values, jnp.inf))
        return main + objective.aux_weight * auxiliary, {
            "loss": main, "mse": mse, "fvu": mse / variance, "auxiliary": auxiliary, "fired": fired,
            "l0": jnp.mean(jnp.sum(values > 0, axis=-1)),
            "threshold": jnp.where(jnp.isfinite(smallest), smallest, 0.0)}

    def _auxiliary(self, model: TopKSAE, x: jax.Array, residual: jax.Array, dead: jax.Array) -> jax.Array:
        """Returns the error of the dead latents' prediction of the residual; 0 if no latent is dead."""
        def predict() -> jax.Array:
            error = jnp.mean((model.mix(model.encode(x, self.aux_k, dead)) - residual)**2)
            if not self.objective.normalize:
                return error
            return error / (_variance(residual) + TINY) * jnp.minimum(jnp.sum(dead) / self.aux_k, 1)
        return jax.lax.cond(jnp.any(dead), predict, lambda: jnp.float32(0))

    def initial_loss_state(self, params: Any) -> Any:
        del params
        return {"silent": np.zeros(self.config.n_latents, np.int32)}

    def extra_batch(self, loss_state: Any, step: jax.Array) -> Batch:
        part = jnp.clip(step / self.objective.k_steps, 0, 1)
        k = self.k_first + (self.config.k - self.k_first) * part
        return {"dead": loss_state["silent"] > self.dead_after, "k": jnp.ceil(k).astype(jnp.int32)}

    def transform_grads(self, params: Any, grads: Any) -> Any:
        """Removes the component of the decoder's gradient along its rows."""
        if not self.objective.project_gradients:
            return grads
        decoder, grad = params["decoder"]["kernel"], grads["decoder"]["kernel"]
        direction = unit(decoder, "rows")
        along = jnp.sum(grad * direction, axis=1, keepdims=True)
        return {**grads, "decoder": {**grads["decoder"], "kernel": grad - along * direction}}

    def post_update(self, params: Any, loss_state: Any, metrics: Metrics) -> tuple[Any, Any, Metrics]:
        """Normalises the decoder, and updates batch_topk's threshold and the latents' silence."""
        decoder = unit(params["decoder"]["kernel"], self.config.unit_norm)
        params = {**params, "decoder": {**params["decoder"], "kernel": decoder}}
        reported = {name: value for name, value in metrics.items() if name not in ("fired", "threshold")}
        if "threshold" in params:
            before, smallest = params["threshold"], metrics["threshold"]
            # The first batch sets the threshold; a batch without an active latent leaves it unchanged.
            decay = jnp.where(before > 0, self.objective.threshold_decay, 0.0)
            params["threshold"] = jnp.where(smallest > 0, decay * before + (1 - decay) * smallest, before)
            reported["threshold"] = params["threshold"]
        fired = metrics["fired"] > 0
        silent = jnp.where(fired, 0, jnp.minimum(loss_state["silent"], 2**30) + self.batch_size)
        return params, {"silent": silent}, reported | {"dead": jnp.mean(silent > self.dead_after)}


def _variance(x: jax.Array) -> jax.Array:
    """Returns the mean squared distance from the mean row."""
    return jnp.mean((x - jnp.mean(x, axis=0))**2)


def geometric_median(rows: np.ndarray, steps: int = 100, tolerance: float = 1e-6) -> np.ndarray:
    """Returns the point with the least summed distance to the rows, `[rows, d]` → `[d]` (Weiszfeld)."""
    point = rows.mean(axis=0)
    for _ in range(steps):
        weights = 1 / np.maximum(np.linalg.norm(rows - point, axis=1), 1e-8)
        before, point = point, weights @ rows / weights.sum()
        if np.linalg.norm(point - before) <= tolerance * (np.linalg.norm(point) + 1e-12):
            break
    return point
