"""Mixture of experts: a router sends each token to k of many feed-forward networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.nn.linear import Linear, Weight, fan_in_normal
from tilelli_jax.nn.norm import rms_normalized
from tilelli_jax.nn.quantize import Quantizer


class TopKRouter(nnx.Module):
    """Gemma 4's router: each token uses the k experts with the largest probabilities.

    p = softmax((RMS(x) · scale / √d_model) · proj), in f32. The k weights are renormalised to sum to
    one and then multiplied by a learned scale of each expert.
    """

    def __init__(self, d_model: int, n_experts: int, k: int, *, eps: float, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32):
        self.proj = Linear(d_model, n_experts, Quantizer(), dtype=dtype, result=jnp.float32, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(d_model))
        self.expert_scale = nnx.Param(jnp.ones(n_experts))
        self.k, self.eps, self.dtype = k, eps, dtype

    @jax.named_scope("router")
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → probabilities `[batch, time, n_experts]`, f32."""
        x = rms_normalized(x, self.eps).astype(self.dtype)
        return jax.nn.softmax(self.proj(x * self.scale[...].astype(self.dtype) * x.shape[-1] ** -0.5))

    @jax.named_scope("router")
    def choose(self, probabilities: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights (f32) and expert indices (int32) of each token, both `[…, k]`."""
        weights, experts = jax.lax.top_k(probabilities, self.k)
        weights = weights / jnp.sum(weights, -1, keepdims=True)
        return weights * self.expert_scale[...][experts], experts


class Experts(nnx.Module):
    """`n_experts` gated feed-forward networks (tanh GELU), each of hidden width d_hidden.

    Kernels: `gate_up [n_experts, d_model, 2 · d_hidden]` (gate first), `down [n_experts, d_hidden, d_model]`.
    """

    def __init__(self, d_model: int, d_hidden: int, n_experts: int, *, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32):
        self.gate_up = Weight((n_experts, d_model, 2 * d_hidden), Quantizer(), init=fan_in_normal(d_model),
                              rngs=rngs)
        self.down = Weight((n_experts, d_hidden, d_model), Quantizer(), init=fan_in_normal(d_hidden),
                           rngs=rngs)
        self.dtype = dtype

    @jax.named_scope("experts")
    def __call__(self, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """Σ_k weights_k · expert_k(x).

        Args:
            x: `[batch, time, d_model]`.
            weights, experts: `[batch, time, k]`.
        """
        n_experts, k = self.down.kernel.shape[0], experts.shape[-1]
        tokens = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        # Rows sorted by expert. A TPU multiplies each expert with its own rows only; on other backends XLA
        # computes a masked product with every expert.
        order = jnp.argsort(experts.reshape(-1), stable=True)
        sizes = jnp.bincount(experts.reshape(-1), length=n_experts).astype(jnp.int32)
        gate, up = jnp.split(self._products(tokens[order // k], self.gate_up, sizes), 2, axis=-1)
        outputs = self._products(jax.nn.gelu(gate) * up, self.down, sizes)
        outputs = outputs.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
        summed = jnp.zeros(tokens.shape, jnp.float32).at[order // k].add(outputs)
        return summed.reshape(x.shape).astype(self.dtype)

    def _products(self, rows: jax.Array, weight: Weight, sizes: jax.Array) -> jax.Array:
        """Multiplies each group of rows by its expert's kernel; accumulates in f32."""
        kernels = weight.quantized().astype(self.dtype)
        return jax.lax.ragged_dot(rows, kernels, sizes, preferred_element_type=jnp.float32).astype(self.dtype)
