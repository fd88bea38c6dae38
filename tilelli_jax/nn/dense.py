"""Position-wise feed-forward networks: the dense pathway, and the MLP of the transformers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.nn.linear import Linear
from tilelli_jax.nn.quantize import Quantizer


def exact_gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x) by erf, PyTorch's default. JAX's default is the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


# `gelu_tanh` is the approximation that transformers calls gelu_new, gelu_fast and gelu_pytorch_tanh.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu, "gelu": exact_gelu, "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu}


class FeedForward(nnx.Module):
    """y = activation(x · up) · down; by default GELU and no biases. The cache is empty."""

    def __init__(self, d_model: int, d_hidden: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 bias: bool = False, activation: Callable[[jax.Array], jax.Array] = exact_gelu,
                 dtype: jnp.dtype = jnp.float32):
        self.up = Linear(d_model, d_hidden, quantizer, bias=bias, rngs=rngs, dtype=dtype)
        self.down = Linear(d_hidden, d_model, quantizer, bias=bias, rngs=rngs, dtype=dtype)
        self.activation = activation

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        return self.down(self.activation(self.up(x)))

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, tuple[()]]:
        del lengths, size
        return self(x), ()

    def step(self, x: jax.Array, cache: tuple[()], position: jax.Array) -> tuple[jax.Array, tuple[()]]:
        del position
        return self(x), cache


class GatedFeedForward(nnx.Module):
    """y = (activation(x · gate) ⊙ (x · up)) · down; by default tanh GELU and no biases.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, d_model: int, d_hidden: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 bias: bool = False, activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
                 dtype: jnp.dtype = jnp.float32):
        self.gate, self.up = (Linear(d_model, d_hidden, quantizer, bias=bias, rngs=rngs, dtype=dtype)
                              for _ in range(2))
        self.down = Linear(d_hidden, d_model, quantizer, bias=bias, rngs=rngs, dtype=dtype)
        self.activation = activation

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        return self.down(self.activation(self.gate(x)) * self.up(x))
