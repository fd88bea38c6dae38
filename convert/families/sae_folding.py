"""Formulas of autoencoders that differ from ours by constants, folded into the weights.

This changes nothing but rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from tilelli_jax.io.tensors import Tensor

BLOCK = 64  # rows of a kernel that are converted to float64 at a time
SMALLEST_NORM = 1e-8  # of a row of the decoder, as in SAELens


@dataclasses.dataclass(frozen=True)
class Folding:
    """How a formula differs from ours: codes = activation((x − b_dec) · W_enc + b_enc).

    Attributes:
        subtract_decoder_bias: whether b_dec is subtracted from x.
        rescale_by_decoder_norm: whether the codes are multiplied by the lengths of the decoder's rows before
            latents are selected, and divided by them before decoding.
        threshold_before_rescaling: whether thresholds apply to the codes before they are multiplied.
        scale: x is multiplied by it first, and x̂ divided by it.
        whitening: x is replaced by (x − mean) · matrix first, and x̂ by x̂ · inverse + mean: the mean
            `[d_model]`, the matrix and its inverse `[d_model, d_model]`.
    """

    subtract_decoder_bias: bool = True
    rescale_by_decoder_norm: bool = False
    threshold_before_rescaling: bool = False
    scale: float = 1.0
    whitening: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our arrays with the differences folded into them; computed on access, in at least float32."""
        dtype = np.dtype(np.float64 if any(array.dtype == np.float64 for array in arrays.values())
                         else np.float32)

        def stored(name: str) -> np.ndarray:
            return arrays[name].read().astype(dtype)

        def encoder() -> np.ndarray:
            kernel = stored("encoder.kernel") * (self.scale * norms()).astype(dtype)
            return kernel if whitening is None else (whitening[1] @ kernel).astype(dtype)

        def decoder() -> np.ndarray:
            kernel = stored("decoder.kernel") / (self.scale * norms())[:, None].astype(dtype)
            return kernel if whitening is None else (kernel @ whitening[2]).astype(dtype)

        def bias() -> np.ndarray:
            scaled = stored("bias").astype(np.float64) / self.scale
            return scaled if whitening is None else scaled @ whitening[2] + whitening[0]

        def encoder_bias() -> np.ndarray:
            own = stored("encoder.bias").astype(np.float64) * norms()
            # (x − c) · W + b = (x − b_dec) · W + b + (b_dec − c) · W, with c the center of x.
            if self.subtract_decoder_bias:
                return own
            shift, kernel = bias() - (0 if whitening is None else whitening[0]), encoder()
            return own + sum(shift[i:i + BLOCK] @ kernel[i:i + BLOCK] for i in range(0, len(shift), BLOCK))

        @functools.cache
        def norms() -> np.ndarray:
            n_latents = arrays["encoder.bias"].shape[0]
            if not self.rescale_by_decoder_norm:
                return np.ones(n_latents)
            squares = np.einsum("ij,ij->i", *[stored("decoder.kernel")] * 2, dtype=np.float64)
            return np.maximum(np.sqrt(squares), SMALLEST_NORM)

        def threshold() -> np.ndarray:
            return stored("threshold") * (norms() if self.threshold_before_rescaling else 1)

        whitening = None if self.whitening is None else tuple(
            tensor.read().astype(np.float64) for tensor in self.whitening)
        folded = {"encoder.kernel": encoder, "encoder.bias": encoder_bias, "decoder.kernel": decoder,
                  "bias": bias, "threshold": threshold}
        return {name: _computed(array.shape, dtype, folded[name]) for name, array in arrays.items()}


def _computed(shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], np.ndarray]) -> Tensor:
    def parts() -> Iterator[np.ndarray]:
        with np.errstate(all="ignore"):  # numbers that are not finite are rejected when the network is loaded
            array = compute().astype(dtype)
        yield array
    return Tensor(shape, dtype, parts)
