"""Products of arrays in the operand type of the network, accumulated in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def contract(subscripts: str, x: jax.Array, y: jax.Array, *, dtype: jnp.dtype,
             result: jnp.dtype | None = None) -> jax.Array:
    """`jnp.einsum` of two operands taken in `dtype`; the result is in `result` (`dtype` by default).

    In bfloat16 an accelerator accumulates in float32 by itself. A CPU does when float32 is asked
    for, which its matrix unit gives for a plain product; for a product with batch axes XLA:CPU
    has no mixed form, and float32 operands are the faster way there anyway.
    """
    x, y, result = x.astype(dtype), y.astype(dtype), result or dtype
    if jnp.dtype(dtype) == jnp.float32:
        return jnp.einsum(subscripts, x, y).astype(result)

    def accelerator(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, x, y, preferred_element_type=result)

    def cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        if _has_batch_axes(subscripts):
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32).astype(result)

    return jax.lax.platform_dependent(x, y, cpu=cpu, default=accelerator)


def project(x: jax.Array, kernel: jax.Array, *, dtype: jnp.dtype,
            result: jnp.dtype | None = None) -> jax.Array:
    """x @ kernel, `[…, in]` and `[in, out]` to `[…, out]`, as one product of two matrices.

    Written on three axes the same product lets XLA:CPU lay its gradients out so that the element-wise
    work fused around them runs three times slower.
    """
    flat = contract("ni,io->no", x.reshape(-1, x.shape[-1]), kernel, dtype=dtype, result=result)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def _has_batch_axes(subscripts: str) -> bool:
    operands, _, out = subscripts.replace("...", "").partition("->")
    first, _, second = operands.partition(",")
    return bool(set(first) & set(second) & set(out))
