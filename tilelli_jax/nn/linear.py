"""Linear layers and embedding tables with optionally quantised weights."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.nn.matmul import project
from tilelli_jax.nn.quantize import Quantizer, hadamard, random_rotation, rotate

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def fan_in_normal(fan_in: int) -> Initializer:
    """Initialises with N(0, 1) / √fan_in."""
    return nnx.initializers.normal(stddev=fan_in**-0.5)


class Buffer(nnx.Variable):
    """A stored array that is not a parameter: saved with the model, never trained."""


class Derived(nnx.Variable):
    """A cached array computed from others: neither trained nor saved."""


PACKED = ".packed"  # suffix of the names of codes


class Packed(nnx.Variable):
    """Codes or scale of a packed weight: saved with the model, never trained, never of another type."""


class Weight(nnx.Module):
    """A full-precision kernel `[..., in, out]` and the quantiser that the forward pass applies to it.

    Variables: `kernel`; `alpha [...]` if the scale is learned (LSQ); `rotation [in, in]` if the
    rotation must be stored (hadamard with an input size that is not a power of two). A packed weight has
    `packed`, the codes (int8, the kernel's shape), and `packed_scale` (f32) in place of kernel and alpha.
    """

    by_row = False  # whether a row of the kernel is an output, as in an embedding table

    def __init__(self, shape: tuple[int, ...], quantizer: Quantizer, *, init: Initializer,
                 rngs: nnx.Rngs, rotates: bool = True):
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.quantizer = quantizer
        self.rotates = quantizer.rotated and rotates
        if quantizer.learned:
            self.alpha = nnx.Param(quantizer.initial_alpha(self.kernel[...]))
        if self.rotates and not _power_of_two(shape[-2]):
            self.rotation = Buffer(random_rotation(jax.random.key(shape[-2]), shape[-2]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return (self.packed if self.is_packed else self.kernel).shape

    @property
    def is_packed(self) -> bool:
        """Whether codes and scale are stored in place of the full-precision kernel."""
        return hasattr(self, "packed")

    def quantized(self) -> jax.Array:
        """The quantised kernel that the forward pass uses, same shape."""
        if self.is_packed:
            kernel = self.packed[...].astype(jnp.float32) * self.packed_scale[...]
            return rotate(self._rotation(), kernel) if self.rotates else kernel
        if self.quantizer == Quantizer():
            return self.kernel[...]
        return self._turned(self.quantizer(self._turned(self.kernel[...]), **self._quantizer_arguments()))

    def codes(self) -> jax.Array:
        """The quantiser's integer codes, same shape. Requires a quantiser with levels."""
        return self.packed[...].astype(jnp.float32) if self.is_packed else self._codes_and_scale()[0]

    def pack(self) -> None:
        """Replaces the kernel by its codes and their scale permanently; without a quantiser, does nothing."""
        if self.quantizer.levels is None or self.is_packed:
            return
        codes, scale = self._codes_and_scale()
        self.packed, self.packed_scale = Packed(codes.astype(jnp.int8)), Packed(scale)
        self._remove("kernel", "alpha")

    def freeze(self) -> None:
        """Replaces the kernel by its quantised values permanently, for decoding."""
        if self.quantizer == Quantizer():
            return
        kernel = self.quantized()
        self._remove("kernel", "alpha", "rotation", "packed", "packed_scale")
        self.kernel = nnx.Param(kernel)
        self.quantizer, self.rotates = Quantizer(), False

    def _remove(self, *names: str) -> None:
        for name in names:
            if hasattr(self, name):
                delattr(self, name)

    def _turned(self, kernel: jax.Array) -> jax.Array:
        """The kernel with outputs as columns, for the quantiser; or back."""
        return jnp.swapaxes(kernel, -1, -2) if self.by_row else kernel

    def _codes_and_scale(self) -> tuple[jax.Array, jax.Array]:
        """Codes and scale whose product is the quantised kernel before its rotation."""
        codes, scale = self.quantizer.codes_and_scale(self._turned(self.kernel[...]),
                                                      **self._quantizer_arguments())
        return self._turned(codes), self._turned(scale)

    def _quantizer_arguments(self) -> dict[str, jax.Array]:
        return ({"alpha": self.alpha[...]} if self.quantizer.learned else {}) | (
            {"rotation": self._rotation()} if self.rotates else {})

    def _rotation(self) -> jax.Array:
        size = self.shape[-2]
        if not hasattr(self, "rotation"):
            return jnp.asarray(hadamard(size))
        stacked = self.rotation.shape[:-2]  # one for each stacked layer, shared by its heads
        heads = (1,) * (len(self.shape) - 2 - len(stacked))
        return self.rotation[...].reshape(*stacked, *heads, size, size)


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
        return y.reshape(*x.shape[:-1], self.shape[-3], self.shape[-1])

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

    by_row = True

    def __init__(self, vocab_size: int, d_model: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32):
        super().__init__((vocab_size, d_model), quantizer, init=fan_in_normal(d_model), rngs=rngs,
                         rotates=False)
        self.dtype = dtype

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
