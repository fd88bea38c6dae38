"""Sparse autoencoders (SAEs): TopK (Gao et al. 2024, arXiv:2406.04093), BatchTopK (Bussmann et al. 2024,
arXiv:2412.06410) and JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.nn.linear import Linear, Weight
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.sparse_codes import dense_codes, top_features, weighted_rows


@dataclasses.dataclass(frozen=True)
class SAEConfig(Section):
    """A TopK, BatchTopK or JumpReLU sparse autoencoder, and the source of its activations."""

    family: Literal["sae"] = setting("sae", "network family")
    d_model: int = setting(1024, "width of the activations", min=1)
    n_latents: int = setting(4096, "number of latents", min=1)
    k: int = setting(32, "maximum number of active latents per row (topk), or their average (batch_topk); "
                     "0 for jumprelu, which has none", min=0)
    activation: Literal["topk", "batch_topk", "jumprelu"] = setting(
        "topk", "how active latents are selected. topk: the k largest of each row. batch_topk: in training "
        "the rows · k largest of the batch, afterwards those above a threshold estimated in training. "
        "jumprelu: those above the latent's own threshold; cannot be trained, only converted")
    max_active: int = setting(
        0, "maximum number of active latents per row for batch_topk and jumprelu, which bounds memory; 0: "
        "4 · k for batch_topk, all for jumprelu", min=0)
    input_norm: Literal["none", "layer_norm"] = setting(
        "none", "normalisation of each row before encoding, undone after decoding: none, or layer_norm "
        "(mean 0, standard deviation 1); layer_norm cannot be trained, only converted")
    unit_norm: Literal["rows", "columns", "none"] = setting(
        "rows", "normalisation of the decoder to length 1: rows (each latent's direction), columns (each "
        "dimension of the activations over all latents, as in fm-difficulty-probe), or none")
    source_model: str = setting(
        "", "source model: the network that the activations come from; empty: not stated")
    hook: str = setting("", "source hook: the hook that the activations come from; empty: not stated")
    layer: int = setting(-1, "source layer: the layer that the activations come from; -1: not stated", min=-1)
    prepend_bos: bool | None = setting(
        None, "whether the texts that the activations come from began with a BOS token; null: not stated")
    context_size: int = setting(
        0, "length in tokens of the texts that the activations come from; 0: not stated", min=0)
    dataset: str = setting("", "data set of the texts that the activations come from; empty: not stated")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation == "jumprelu":
            if self.k:
                raise InputError("k: expected 0 with activation jumprelu, which has thresholds in place of k "
                                 f"and cannot be trained, found {self.k}")
        elif self.k < 1:
            raise InputError(f"k: expected an integer ≥ 1, found {self.k}")
        elif self.k > self.n_latents:
            raise InputError(f"k: expected at most n_latents {self.n_latents}, found {self.k}")
        if self.max_active and self.activation == "topk":
            raise InputError(f"max_active: expected 0 with activation topk, found {self.max_active}")
        if self.max_active and not self.k <= self.max_active <= self.n_latents:
            raise InputError(f"max_active: expected 0, or from {f'k {self.k}' if self.k else 1} to n_latents "
                             f"{self.n_latents}, found {self.max_active}")

    @property
    def n_codes(self) -> int:
        """Number of codes stored for each row, including codes of 0."""
        if self.activation == "topk":
            return self.k
        if self.activation == "jumprelu":
            return self.max_active or self.n_latents
        return self.max_active or min(4 * self.k, self.n_latents)

    @property
    def threshold_shape(self) -> tuple[int, ...] | None:
        """Shape of the thresholds; None if the activation has none."""
        return {"topk": None, "batch_topk": (), "jumprelu": (self.n_latents,)}[self.activation]


class Codes(NamedTuple):
    """The active latents of each row, and what undoes the normalisation of the row.

    Attributes:
        values: `[…, n_codes]`, f32 ≥ 0.
        latents: indices of the latents, int32, same shape.
        mean, deviation: `[…, 1]`, f32, of the row, with input_norm layer_norm; otherwise None.
    """

    values: jax.Array
    latents: jax.Array
    mean: jax.Array | None = None
    deviation: jax.Array | None = None


class TopKSAE(nnx.Module):
    """codes = ReLU(the k largest of (x − b_dec) · W_enc + b_enc);  x̂ = codes · W_dec + b_dec.

    The k largest are selected before the ReLU, so fewer may be active. With activation batch_topk, the
    active latents are those among a row's `config.n_codes` largest that exceed `threshold`, a scalar that
    is 0 before training and estimated in training without a gradient (`training.sae_loss`). With jumprelu,
    they are the `config.n_codes` largest of those that exceed their own `threshold [n_latents]`; a threshold
    of 0 is a ReLU. With input_norm layer_norm, x has its mean subtracted and is divided by its standard
    deviation (of d_model − 1 degrees of freedom, plus 1e-5) before the formula, and x̂ is multiplied by the
    deviation and has the mean added, as in openai/sparse_autoencoder and SAELens. Kernels:
    `encoder [d_model, n_latents]`, `decoder [n_latents, d_model]`; `bias [d_model]` is b_dec. The decoder's
    rows are initialised with random directions, the encoder with the decoder's transpose.
    """

    def __init__(self, config: SAEConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        dtype = jnp.dtype((compute or ComputeConfig()).dtype)
        self.config, self.dtype = config, dtype
        self.encoder = Linear(config.d_model, config.n_latents, Quantizer(), bias=True, dtype=dtype,
                              result=jnp.float32, rngs=rngs)
        self.decoder = Weight((config.n_latents, config.d_model), Quantizer(), init=_directions, rngs=rngs)
        self.encoder.kernel[...] = self.decoder.kernel[...].T
        self.decoder.kernel[...] = unit(self.decoder.kernel[...], config.unit_norm)
        self.bias = nnx.Param(jnp.zeros(config.d_model))
        shape = config.threshold_shape
        self.threshold = None if shape is None else nnx.Param(jnp.zeros(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[…, d_model]` → its reconstruction, f32, same shape."""
        return self.decode(self.encode(x))

    def encode(self, x: jax.Array, k: int | None = None, among: jax.Array | None = None) -> Codes:
        """x `[…, d_model]` → the active latents, the largest first.

        Args:
            k: number of latents, ignoring the threshold; by default as configured.
            among: bool `[n_latents]`, candidate latents. If there are fewer than k, the other codes are 0.
        """
        assert self.encoder.bias is not None
        bias = self.encoder.bias[...]
        if among is not None:
            bias = jnp.where(among, bias, -jnp.inf)
        mean = deviation = None
        if self.config.input_norm == "layer_norm":
            x, mean, deviation = layer_norm(x)
        flat = x.reshape(-1, x.shape[-1])
        if k is None and self.config.activation == "jumprelu":
            assert self.threshold is not None
            product = jnp.matmul((flat - self.bias[...]).astype(self.dtype),
                                 self.encoder.kernel[...].astype(self.dtype),
                                 preferred_element_type=jnp.float32) + bias
            # A latent below its threshold must not take the place of a smaller one above its own.
            all_codes = jnp.where(product > self.threshold[...], jax.nn.relu(product), 0.0)
            values, latents = jax.lax.top_k(all_codes, self.config.n_codes)
        else:
            values, latents = top_features(flat, self.bias[...], self.encoder.kernel[...], bias,
                                           k or self.config.n_codes, self.dtype)
            values = jax.nn.relu(values)
            if k is None and self.threshold is not None:
                values = jnp.where(values > self.threshold[...], values, 0.0)
        shape = (*x.shape[:-1], values.shape[-1])
        return Codes(values.reshape(shape), latents.reshape(shape), mean, deviation)

    def decode(self, codes: Codes) -> jax.Array:
        """The reconstruction `[…, d_model]`, f32. Reads only the decoder rows of active latents."""
        decoded = self.mix(codes) + self.bias[...]
        if codes.mean is None or codes.deviation is None:
            return decoded
        return decoded * codes.deviation + codes.mean

    def mix(self, codes: Codes) -> jax.Array:
        """The sum of decoder rows weighted by the codes, without the bias: `[…, d_model]`, f32."""
        values, latents = (array.reshape(-1, array.shape[-1]) for array in (codes.values, codes.latents))
        mixed = weighted_rows(values, latents, self.decoder.kernel[...], self.dtype)
        return mixed.reshape(*codes.values.shape[:-1], self.config.d_model)

    def dense(self, codes: Codes) -> jax.Array:
        """The codes of all latents, `[…, n_latents]`, f32: 0 for inactive latents."""
        values, latents = (array.reshape(-1, array.shape[-1]) for array in (codes.values, codes.latents))
        all_codes = dense_codes(values, latents, self.config.n_latents)
        return all_codes.reshape(*codes.values.shape[:-1], self.config.n_latents)


def layer_norm(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises x `[…, d_model]` as openai/sparse_autoencoder does.

    Returns the normalised rows, f32, and their means and standard deviations, each `[…, 1]`.
    """
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    deviation = x.std(axis=-1, keepdims=True, ddof=1)
    return (x - mean) / (deviation + 1e-5), mean, deviation


def unit(decoder: jax.Array, axis: str) -> jax.Array:
    """Normalises the rows or columns of the decoder `[n_latents, d_model]` to length 1 (eps 1e-12)."""
    if axis == "none":
        return decoder
    lengths = jnp.linalg.norm(decoder, axis=1 if axis == "rows" else 0, keepdims=True)
    return decoder / jnp.maximum(lengths, 1e-12)


def _directions(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return unit(jax.random.normal(key, shape, dtype), "rows")
