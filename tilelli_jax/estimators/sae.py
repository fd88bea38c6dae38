"""TopK sparse autoencoders (Gao et al. 2024, arXiv:2406.04093)."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.nn.linear import Linear, Weight, fan_in_normal
from tilelli_jax.nn.quantize import Quantizer


@dataclasses.dataclass(frozen=True)
class SAEConfig(Section):
    """A TopK sparse autoencoder."""

    family: Literal["sae"] = setting("sae", "which network")
    d_model: int = setting(1024, "width of the activations", least=1)
    n_latents: int = setting(4096, "number of latents", least=1)
    k: int = setting(32, "latents that are active at once, at most", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.n_latents:
            raise InputError(f"k: expected at most n_latents {self.n_latents}, found {self.k}")


class Codes(NamedTuple):
    """The active latents of each activation: values `[…, k]`, f32 ≥ 0, and which, int32 `[…, k]`."""

    values: jax.Array
    latents: jax.Array


class TopKSAE(nnx.Module):
    """codes = ReLU(the k largest of (x − b_dec) · W_enc + b_enc);  x̂ = codes · W_dec + b_dec.

    The k are taken before the ReLU, so that fewer may be active. Kernels: `encoder [d_model, n_latents]`,
    `decoder [n_latents, d_model]`; `bias [d_model]` is b_dec.
    """

    def __init__(self, config: SAEConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        dtype = jnp.dtype((compute or ComputeConfig()).dtype)
        self.config, self.dtype = config, dtype
        self.encoder = Linear(config.d_model, config.n_latents, Quantizer(), bias=True, dtype=dtype,
                              result=jnp.float32, rngs=rngs)
        self.decoder = Weight((config.n_latents, config.d_model), Quantizer(),
                              init=fan_in_normal(config.d_model), rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(config.d_model))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[…, d_model]` → its reconstruction, f32, same shape."""
        return self.decode(self.encode(x))

    def encode(self, x: jax.Array) -> Codes:
        """x `[…, d_model]` → the active latents."""
        values, latents = jax.lax.top_k(self.encoder(x - self.bias[...]), self.config.k)
        return Codes(jax.nn.relu(values), latents)

    def decode(self, codes: Codes) -> jax.Array:
        """Reads only the k rows of the decoder that are active: `[…, d_model]`, f32."""
        rows = self.decoder.kernel[...][codes.latents].astype(self.dtype)
        mixed = jnp.einsum("...k,...kd->...d", codes.values.astype(self.dtype), rows,
                           preferred_element_type=jnp.float32)
        return mixed + self.bias[...]

    def dense(self, codes: Codes) -> jax.Array:
        """The codes of all latents, `[…, n_latents]`, f32: zero where they are not active."""
        flat = codes.values.reshape(-1, codes.values.shape[-1])
        which = codes.latents.reshape(flat.shape)
        every = jnp.zeros((len(flat), self.config.n_latents), jnp.float32)
        every = every.at[jnp.arange(len(flat))[:, None], which].set(flat)
        return every.reshape(*codes.values.shape[:-1], self.config.n_latents)
