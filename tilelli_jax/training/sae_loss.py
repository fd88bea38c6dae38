"""What a TopK autoencoder is trained for, and what its updates do besides (Gao et al. 2024).

By default, as the field does it now: the decoder's rows have length 1, gradients along them are taken
out, losses are fractions of a variance, dead latents learn to foretell the residual (AuxK).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.config import Section, setting
from tilelli_jax.estimators.sae import Codes, SAEConfig, TopKSAE, unit
from tilelli_jax.training.losses import Batch, Loss
from tilelli_jax.training.step import Metrics, Rule, TrainState

TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Section):
    """The loss of a TopK autoencoder."""

    normalize: bool = setting(
        True, "losses are fractions of the batch's variance, and the auxiliary one grows with the number of "
        "dead latents up to aux_k; otherwise plain mean squares")
    project: bool = setting(True, "take out of the decoder's gradient what would change its rows' lengths")
    center: Literal["geometric_median", "mean", "zero"] = setting(
        "geometric_median", "where the decoder's bias begins, of up to 16384 training rows")
    aux_weight: float = setting(1 / 32, "weight of the auxiliary loss", least=0)
    aux_k: int = setting(0, "dead latents that foretell a residual, at most; 0: half of d_model", least=0)
    dead_after: int = setting(
        0, "activations without a latent's being active after which it is dead; 0: a million, or a tenth of "
        "the run where that is less", least=0)
    k_start: int = setting(0, "latents active in the first update; 0: k from the start", least=0)
    k_steps: int = setting(1000, "updates in which k_start falls to k", least=1)


def make_objective(config: SAEConfig, objective: ObjectiveConfig, *, batch_size: int, steps: int,
                   ) -> tuple[Loss, Rule]:
    """The loss, and the rule that goes with it.

    Batch: `activations [rows, d_model]`, and from the rule `dead` bool `[n_latents]`, `k` int32.
    Reported: `loss` (of the reconstruction alone), `mse`, `fvu`, `l0`, `auxiliary`, and after an
    update `dead`, the share of dead latents.
    """
    most = max(config.k, min(objective.k_start, config.n_latents))
    aux_k = min(objective.aux_k or max(1, config.d_model // 2), config.n_latents)
    dead_after = objective.dead_after or min(10**6, max(1, batch_size * steps // 10))

    def loss(model: TopKSAE, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # nothing is drawn
        x = batch["activations"].astype(jnp.float32)
        codes = model.encode(x, most)
        values = jnp.where(jnp.arange(most) < batch["k"], codes.values, 0.0)
        residual = x - model.decode(Codes(values, codes.latents))
        mse = jnp.mean(residual**2)
        fvu = mse / (_variance(x) + TINY)
        auxiliary = _auxiliary(model, x, jax.lax.stop_gradient(residual), batch["dead"])
        fired = jnp.zeros(config.n_latents).at[codes.latents].max(jnp.where(values > 0, 1.0, 0.0))
        main = fvu if objective.normalize else mse
        return main + objective.aux_weight * auxiliary, {
            "loss": main, "mse": mse, "fvu": fvu, "auxiliary": auxiliary, "fired": fired,
            "l0": jnp.mean(jnp.sum(values > 0, axis=-1))}

    def _auxiliary(model: TopKSAE, x: jax.Array, residual: jax.Array, dead: jax.Array) -> jax.Array:
        def foretell() -> jax.Array:
            error = jnp.mean((model.mix(model.encode(x, aux_k, dead)) - residual)**2)
            if not objective.normalize:
                return error
            return error / (_variance(residual) + TINY) * jnp.minimum(jnp.sum(dead) / aux_k, 1)
        return jax.lax.cond(jnp.any(dead), foretell, lambda: jnp.float32(0))

    def given(state: TrainState) -> Batch:
        part = jnp.clip(state.step / objective.k_steps, 0, 1)
        k = most + (config.k - most) * part
        return {"dead": state.memory["silent"] > dead_after, "k": jnp.ceil(k).astype(jnp.int32)}

    def shape(params: Any, grads: Any) -> Any:
        if not objective.project:
            return grads
        decoder, grad = params["decoder"]["kernel"], grads["decoder"]["kernel"]
        direction = unit(decoder, "rows")
        along = jnp.sum(grad * direction, axis=1, keepdims=True)
        return {**grads, "decoder": {**grads["decoder"], "kernel": grad - along * direction}}

    def settle(params: Any, memory: Any, metrics: Metrics) -> tuple[Any, Any, Metrics]:
        decoder = unit(params["decoder"]["kernel"], config.unit_norm)
        params = {**params, "decoder": {**params["decoder"], "kernel": decoder}}
        fired = metrics["fired"] > 0
        silent = jnp.where(fired, 0, jnp.minimum(memory["silent"], 2**30) + batch_size)
        told = {name: value for name, value in metrics.items() if name != "fired"}
        return params, {"silent": silent}, told | {"dead": jnp.mean(silent > dead_after)}

    return loss, Rule(memory={"silent": np.zeros(config.n_latents, np.int32)}, given=given, shape=shape,
                      settle=settle)


def _variance(x: jax.Array) -> jax.Array:
    """Mean squared distance from the rows' mean."""
    return jnp.mean((x - jnp.mean(x, axis=0))**2)


def geometric_median(rows: np.ndarray, steps: int = 100, tolerance: float = 1e-6) -> np.ndarray:
    """The point whose summed distance to the rows is least: `[rows, d]` → `[d]` (Weiszfeld's iteration)."""
    point = rows.mean(axis=0)
    for _ in range(steps):
        weights = 1 / np.maximum(np.linalg.norm(rows - point, axis=1), 1e-8)
        before, point = point, weights @ rows / weights.sum()
        if np.linalg.norm(point - before) <= tolerance * (np.linalg.norm(point) + 1e-12):
            break
    return point
