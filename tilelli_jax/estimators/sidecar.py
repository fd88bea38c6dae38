"""Recall's sidecar: predicts P(the model knows) from features of each layer and of the whole prompt."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.nn.linear import Buffer, Linear
from tilelli_jax.nn.quantize import Quantizer


@dataclasses.dataclass(frozen=True)
class SidecarConfig(Section):
    """A GRU over the layers, and a head that reads its states and the features of the whole prompt."""

    family: Literal["lrd"] = setting("lrd", "network family")
    n_features: int = setting(12, "number of features of each layer", min=1)
    n_prompt_features: int = setting(10, "number of features of the whole prompt", min=0)
    d_hidden: int = setting(96, "width of the GRU's state and of the head's hidden layer", min=1)
    features: tuple[str, ...] = setting((), "names of the features of each layer; empty: not stated")
    prompt_features: tuple[str, ...] = setting((), "names of the features of the whole prompt; empty: not "
                                               "stated")


class Standardiser(nnx.Module):
    """(x − mean) / scale, with the mean and scale of the training set, stored as buffers."""

    def __init__(self, size: int):
        self.mean, self.scale = Buffer(jnp.zeros(size)), Buffer(jnp.ones(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) - self.mean[...]) / self.scale[...]


class GRU(nnx.Module):
    """A gated recurrent unit (Cho et al. 2014), in PyTorch's form, from a state of zeros, f32.

    r, z = σ(x·W + b + h·U + c);  n = tanh(x·W_n + b_n + r ⊙ (h·U_n + c_n));  h ← (1 − z) ⊙ n + z ⊙ h.
    Columns of `input [d_in, 3·d]` and `state [d, 3·d]` are r, z, n.
    """

    def __init__(self, d_in: int, d_hidden: int, *, rngs: nnx.Rngs):
        self.input, self.state = (Linear(size, 3 * d_hidden, Quantizer(), bias=True, rngs=rngs)
                                  for size in (d_in, d_hidden))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_in]` → the states `[batch, time, d_hidden]`."""
        def step(h: jax.Array, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
            recurrent = self.state(h)
            r, z = jnp.split(jax.nn.sigmoid(projected[:, :2 * d] + recurrent[:, :2 * d]), 2, axis=-1)
            n = jnp.tanh(projected[:, 2 * d:] + r * recurrent[:, 2 * d:])
            h = (1 - z) * n + z * h
            return h, h

        d = self.state.kernel.shape[0]
        _, states = jax.lax.scan(step, jnp.zeros((len(x), d)), jnp.swapaxes(self.input(x), 0, 1))
        return jnp.swapaxes(states, 0, 1)


class Sidecar(nnx.Module):
    """logit = head(mean over layers of the GRU's states, its last one, prompt features);  P = σ(logit /
    T).
    """

    def __init__(self, config: SidecarConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        del compute  # small enough for f32 anywhere
        self.config = config
        self.feature_scaler = Standardiser(config.n_features)
        self.prompt_scaler = Standardiser(config.n_prompt_features)
        self.gru = GRU(config.n_features, config.d_hidden, rngs=rngs)
        self.hidden = Linear(2 * config.d_hidden + config.n_prompt_features, config.d_hidden, Quantizer(),
                             bias=True,
                             rngs=rngs)
        self.out = Linear(config.d_hidden, 1, Quantizer(), bias=True, rngs=rngs)
        self.temperature = Buffer(jnp.ones(()))

    def __call__(self, features: jax.Array, prompt_features: jax.Array) -> jax.Array:
        """P(knows).

        Args:
            features: `[batch, layers, n_features]`.
            prompt_features: `[batch, n_prompt_features]`, features of the whole prompt.

        Returns:
            `[batch]`, f32.
        """
        return jax.nn.sigmoid(self.logits(features, prompt_features) / self.temperature[...])

    def logits(self, features: jax.Array, prompt_features: jax.Array,
               drop: tuple[jax.Array, float] | None = None) -> jax.Array:
        """The logit before temperature scaling: `[batch]`, f32.

        Args:
            drop: PRNG key and dropout rate of the head's hidden layer in training; None: no dropout.
        """
        states = self.gru(self.feature_scaler(features))
        scaled = self.prompt_scaler(prompt_features)
        pooled = jnp.concatenate([states.mean(1), states[:, -1], scaled], axis=-1)
        hidden = jax.nn.relu(self.hidden(pooled))
        if drop is not None and drop[1] > 0:
            mask = jax.random.bernoulli(drop[0], 1 - drop[1], hidden.shape)
            hidden = jnp.where(mask, hidden / (1 - drop[1]), 0)
        return self.out(hidden)[:, 0]
