"""Weight quantisers with straight-through gradients.

A quantiser maps a kernel `[..., in, out]` to a kernel of the same shape with few distinct values. The
last two axes are one tensor; leading axes (heads, layers) stack separate tensors. The gradient passes
straight through to the full-precision kernel (the straight-through estimator, STE; Bengio et al. 2013,
arXiv:1308.3432). Activations are never quantised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

QuantizerName = Literal["none", "ternary", "ternary_row", "hadamard", "lsq", "power3", "power3_row"]
MIN_SCALE = 1e-5


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Quantises a kernel to `codes · scale`, with a learned scale or the mean absolute weight.

    Attributes:
        levels: "ternary" for codes {-1, 0, 1}, "power3" for {0, ±1, ±3, ±9}, None for no quantisation.
        per_row: one scale for each output feature instead of one for the tensor.
        learned: the scale is a parameter (LSQ) instead of the mean absolute weight.
        rotated: rotate the kernel along its input axis before quantisation (Hadamard).
    """

    levels: Literal["ternary", "power3"] | None = None
    per_row: bool = False
    learned: bool = False
    rotated: bool = False

    def __call__(self, kernel: jax.Array, alpha: jax.Array | None = None,
                 rotation: jax.Array | None = None) -> jax.Array:
        """The quantised kernel, f32, same shape.

        Args:
            kernel: full-precision weights `[..., in, out]`, f32.
            alpha: the learned scale `[...]` of LSQ.
            rotation: orthogonal R `[in, in]`. The result is R · quantised(Rᵀ · kernel), so that
                x @ result = (x·R) @ quantised(Rᵀ·kernel).
        """
        if self.levels is None:
            return kernel
        if self.learned:
            assert alpha is not None
            return _lsq(kernel, jnp.maximum(alpha, MIN_SCALE)[..., None, None])
        if rotation is not None:
            return rotate(rotation, self._straight_through(rotate_back(rotation, kernel)))
        return self._straight_through(kernel)

    def codes_and_scale(self, kernel: jax.Array, alpha: jax.Array | None = None,
                        rotation: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The integer codes `[..., in, out]` (as f32) and the scale `[..., 1, 1 or out]`; no gradient.

        Their product is the quantised kernel; with a rotation, before it is rotated.
        """
        if rotation is not None:
            kernel = rotate_back(rotation, kernel)
        scale = self.scale(kernel) if alpha is None else jnp.maximum(alpha, MIN_SCALE)[..., None, None]
        return _codes(jax.lax.stop_gradient(kernel / scale), self.levels), scale

    def scale(self, kernel: jax.Array) -> jax.Array:
        """α = max(mean |w|, 1e-5): `[..., 1, 1]`, or `[..., 1, out]` per row."""
        axes = (-2,) if self.per_row else (-2, -1)
        return jnp.maximum(jnp.mean(jnp.abs(kernel), axes, keepdims=True), MIN_SCALE)

    def initial_alpha(self, kernel: jax.Array) -> jax.Array:
        """The initial scale of LSQ `[...]`: the mean absolute weight."""
        return jnp.squeeze(self.scale(kernel), (-2, -1))

    def _straight_through(self, kernel: jax.Array) -> jax.Array:
        scale = self.scale(kernel)
        return _pass_gradient(kernel, _codes(kernel / scale, self.levels) * scale)


_QUANTIZERS: dict[QuantizerName, Quantizer] = {
    "none": Quantizer(),
    "ternary": Quantizer("ternary"),
    "ternary_row": Quantizer("ternary", per_row=True),
    "hadamard": Quantizer("ternary", rotated=True),
    "lsq": Quantizer("ternary", learned=True),
    "power3": Quantizer("power3"),
    "power3_row": Quantizer("power3", per_row=True),
}


def quantizer(name: QuantizerName) -> Quantizer:
    """Returns the quantiser with this name."""
    return _QUANTIZERS[name]


def rotate(rotation: jax.Array, kernel: jax.Array) -> jax.Array:
    """R · kernel: `[..., in, in]`, `[..., in, out]` → `[..., in, out]`."""
    return jnp.einsum("...ij,...jo->...io", rotation, kernel)


def rotate_back(rotation: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rᵀ · kernel; the inverse of `rotate`."""
    return jnp.einsum("...ij,...io->...jo", rotation, kernel)


def hadamard(n: int) -> np.ndarray:
    """Sylvester's Hadamard matrix divided by √n, `[n, n]` f32: symmetric and orthogonal. n = 2^m."""
    chex.assert_equal(n & (n - 1), 0)
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(n)).astype(np.float32)


def random_rotation(key: jax.Array, n: int) -> jax.Array:
    """A Haar-random orthogonal matrix `[n, n]` f32, for sizes without a Sylvester matrix."""
    return jax.random.orthogonal(key, n, dtype=jnp.float32)


def _codes(ratio: jax.Array, levels: str | None) -> jax.Array:
    """Rounds w/α to a level: ternary rounds half to even; power3 has boundaries 0.5, 2, 6 and rounds down."""
    if levels == "ternary":
        codes = jnp.clip(jnp.round(ratio), -1.0, 1.0)
    else:
        size = jnp.abs(ratio)
        level = jnp.where(size > 6.0, 9.0, jnp.where(size > 2.0, 3.0, jnp.where(size > 0.5, 1.0, 0.0)))
        codes = jnp.sign(ratio) * level
    return jnp.where(codes == 0, 0.0, codes)  # not -0.0, which integer codes do not have


@jax.custom_jvp
def _pass_gradient(kernel: jax.Array, quantized: jax.Array) -> jax.Array:
    # Not `kernel + stop_gradient(quantized - kernel)`: its rounding error would make the values differ
    # slightly from codes · scale.
    return quantized


@_pass_gradient.defjvp
def _pass_gradient_jvp(primals: Sequence[jax.Array],
                       tangents: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


@jax.custom_jvp
def _lsq(kernel: jax.Array, alpha: jax.Array) -> jax.Array:
    """Learned step size quantisation (Esser et al. 2020, arXiv:1902.08153) with three levels.

    The gradient of alpha is eq. 3 of the LSQ paper times 1/√numel. The gradient of the kernel passes
    straight through everywhere, as for the other quantisers; the LSQ paper clips it.
    """
    return _codes(kernel / alpha, "ternary") * alpha


@_lsq.defjvp
def _lsq_jvp(primals: Sequence[jax.Array],
             tangents: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    kernel, alpha = primals
    ratio = kernel / alpha
    codes = _codes(ratio, "ternary")
    slope = jnp.where(jnp.abs(ratio) < 1.0, codes - ratio, jnp.sign(ratio))
    gradient_scale = 1.0 / np.sqrt(kernel.shape[-1] * kernel.shape[-2])
    return codes * alpha, tangents[0] + slope * gradient_scale * tangents[1]
