"""The router: the weights with which each token mixes the pathways."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.nn.linear import Linear
from tilelli_jax.nn.quantize import Quantizer


class Router(Linear):
    """weights = softmax(x · kernel (+ bias)), in f32: no top-1 choice, no temperature."""

    def __init__(self, d_model: int, n_paths: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 bias: bool = False):
        super().__init__(d_model, n_paths, quantizer, rngs=rngs, bias=bias)

    @jax.named_scope("router")
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → weights `[batch, time, n_paths]`, f32, summing to one."""
        return jax.nn.softmax(super().__call__(x))


def entropy(weights: jax.Array) -> jax.Array:
    """Router entropy divided by log n_paths, in [0, 1]: `[..., n_paths]` → `[...]`. 1: uniform weights.

    With a single pathway the result is 0.
    """
    n_paths = weights.shape[-1]
    log_weights = jnp.log(jnp.maximum(weights, jnp.finfo(jnp.float32).tiny))
    return -jnp.sum(weights * log_weights, -1) / math.log(max(n_paths, 2))


def divergence(before: jax.Array, weights: jax.Array) -> jax.Array:
    """KL(before ‖ weights) in nats, f32: `[..., n_paths]` twice → `[...]`."""
    tiny = jnp.finfo(jnp.float32).tiny
    log_ratio = jnp.log(jnp.maximum(before, tiny)) - jnp.log(jnp.maximum(weights, tiny))
    return jnp.sum(before * log_ratio, -1)


def load_balance_loss(weights: jax.Array) -> jax.Array:
    """n·Σ_i p̄_i² − 1 with p̄ the mean weight over batch and time, averaged over blocks.

    weights `[blocks, batch, time, n_paths]` → scalar: 0 at uniform use, n − 1 at collapse. It is the
    importance loss of Shazeer et al. 2017 (arXiv:1701.06538), eq. 6, up to a constant factor: the
    squared coefficient of variation of the pathways' use.
    """
    use = jnp.mean(weights, (1, 2))
    return jnp.mean(weights.shape[-1] * jnp.sum(jnp.square(use), -1) - 1.0)
