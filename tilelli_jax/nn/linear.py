"""Linear layers and embedding tables with optionally quantised weights."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.nn.matmul import project
from tilelli_jax.nn.quantize import Quantizer, hadamard, random_rotation

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def fan_in_normal(fan_in: int) -> Initializer:
    """Initialises with N(0, 1) / √fan_in."""
    return nnx.initializers.normal(stddev=fan_in**-0.5)


class Buffer(nnx.Variable):
    """A stored array that is not a parameter: saved with the model, never trained."""


class Derived(nnx.Variable):
    """A cached array computed from others: neither trained nor saved."""


class Weight(nnx.Module):
    """A full-precision kernel `[..., in, out]` and the quantiser that the forward pass applies to it.

    Variables: `kernel`; `alpha [...]` if the scale is learned (LSQ); `rotation [in, in]` if the
    rotation must be stored (hadamard with an input size that is not a power of two).
    """

    def __init__(self, shape: tuple[int, ...], quantizer: Quantizer, *, init: Initializer,
                 rngs: nnx.Rngs, rotates: bool = True):
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.quantizer = quantizer
        self.rotates = quantizer.rotated and rotates
        if quantizer.learned:
            self.alpha = nnx.Param(quantizer.initial_alpha(self.kernel[...]))
        if self.rotates and not _power_of_two(shape[-2]):
            self.rotation = Buffer(random_rotation(jax.random.key(shape[-2]), shape[-2]))

    def quantized(self) -> jax.Array:
        """The quantised kernel that the forward pass uses, same shape."""
        return self.quantizer(self.kernel[...], **self._quantizer_arguments())

    def codes(self) -> jax.Array:
        """The quantiser's integer codes, same shape. Requires a quantiser with levels."""
        return self.quantizer.codes(self.kernel[...], **self._quantizer_arguments())

    def freeze(self) -> None:
        """Replaces the kernel by its quantised values permanently, for decoding."""
        if self.quantizer == Quantizer():
            return
        self.kernel[...] = self.quantized()
        self.quantizer, self.rotates = Quantizer(), False
        for name in ("alpha", "rotation"):
            if hasattr(self, name):
                delattr(self, name)

    def _quantizer_arguments(self) -> dict[str, jax.Array]:
        arguments = {}
        if self.quantizer.learned:
            arguments["alpha"] = self.alpha[...]
        if self.rotates:
            size = self.kernel.shape[-2]
            if hasattr(self, "rotation"):  # one for each stacked layer, shared by its heads
                stacked = self.rotation.shape[:-2]
                heads = (1,) * (self.kernel.ndim - 2 - len(stacked))
                arguments["rotation"] = self.rotation[...].reshape(*stacked, *heads, size, size)
            else:
                arguments["rotation"] = jnp.asarray(hadamard(size))
        return arguments


class Linear(Weight):
    """y = x @ kernel (+ bias), kernel `[in, out]`: `[..., in]` → `[..., out]`.

    Operands are in `dtype`, the output in `result` (default: `dtype`); accumulation is in f32.
    """

    def __init__(self, d_in: int, d_out: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32, result: jnp.dtype | None = None, bias: bool = False):
        super().__init__((d_in, d_out), quantizer, init=fan_in_normal(d_in), rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None
        self.dtype = dtype
        self.result = result or dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = project(x, self.quantized(), dtype=self.dtype, result=self.result)
        return y if self.bias is None else y + self.bias[...].astype(self.result)


class HeadwiseLinear(Weight):
    """One kernel for each head, `[heads, in, out]`: `[batch, time, in]` → `[batch, time, heads, out]`.

    Each head has a separate quantisation scale.
    """

    def __init__(self, n_heads: int, d_in: int, d_out: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32):
        super().__init__((n_heads, d_in, d_out), quantizer, init=fan_in_normal(d_in), rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        concatenated = self.concatenated[...] if hasattr(self, "concatenated") else self._concatenated()
        y = project(x, concatenated, dtype=self.dtype)
        return y.reshape(*x.shape[:-1], self.kernel.shape[-3], self.kernel.shape[-1])

    def freeze(self) -> None:
        """As `Weight.freeze`; also caches the concatenated heads, so that calls need not transpose them."""
        super().freeze()
        self.concatenated = Derived(self._concatenated())

    def _concatenated(self) -> jax.Array:
        """The heads' kernels concatenated, `[..., in, heads · out]`."""
        kernel = jnp.swapaxes(self.quantized(), -3, -2)
        return kernel.reshape(*kernel.shape[:-2], -1)


class Embedding(Weight):
    """A table `[vocab, d_model]`, read by row; `attend` computes the logits of tied embeddings.

    Per-row quantisation has one scale for each vocabulary entry.
    """

    def __init__(self, vocab_size: int, d_model: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32):
        super().__init__((vocab_size, d_model), quantizer, init=fan_in_normal(d_model), rngs=rngs,
                         rotates=False)
        self.dtype = dtype

    def quantized(self) -> jax.Array:
        if self.quantizer == Quantizer():
            return self.kernel[...]
        transposed = jnp.swapaxes(self.kernel[...], -1, -2)
        return jnp.swapaxes(self.quantizer(transposed, **self._quantizer_arguments()), -1, -2)

    def codes(self) -> jax.Array:
        transposed = jnp.swapaxes(self.kernel[...], -1, -2)
        return jnp.swapaxes(self.quantizer.codes(transposed, **self._quantizer_arguments()), -1, -2)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids `[batch, time]` → `[batch, time, d_model]`."""
        table = self.quantized().astype(self.dtype)
        mesh = jax.sharding.get_abstract_mesh()
        if "tensor" in mesh.axis_names and len(table) % mesh.shape["tensor"] == 0:
            # Whole rows, gathered like every other weight; otherwise XLA would replicate the rows read.
            table = jax.lax.with_sharding_constraint(table, jax.sharding.PartitionSpec("tensor", None))
        return table[ids]

    def attend(self, x: jax.Array) -> jax.Array:
        """x `[batch, time, d_model]` → logits `[batch, time, vocab]`, f32."""
        return project(x, self.quantized().T, dtype=self.dtype, result=jnp.float32)


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
