"""Array products with operands in the network's dtype and float32 accumulation."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def contract(subscripts: str, x: jax.Array, y: jax.Array, *, dtype: jnp.dtype,
             result: jnp.dtype | None = None) -> jax.Array:
    """`jnp.einsum` with both operands cast to `dtype`; the output has type `result` (default: `dtype`).

    With bfloat16 operands an accelerator always accumulates in float32. A CPU does so if the output
    type is float32, which its matrix unit supports for a plain product. For a product with batch axes
    XLA:CPU has no mixed-precision form; there the operands are cast to float32, which is also faster.
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
    """x @ kernel, `[…, in]` and `[in, out]` → `[…, out]`, as one product of two matrices.

    With three axes, XLA:CPU chooses a layout of the gradients in which the element-wise operations
    fused with them run three times slower.
    """
    flat = contract("ni,io->no", x.reshape(-1, x.shape[-1]), kernel, dtype=dtype, result=result)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def _has_batch_axes(subscripts: str) -> bool:
    operands, _, out = subscripts.replace("...", "").partition("->")
    first, _, second = operands.partition(",")
    return bool(set(first) & set(second) & set(out))
