"""Finds where a loss or a gradient stopped being finite."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import path_name, replicated
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.loss import Batch, Loss
from tilelli_jax.training.step import Network


class Diverged(RuntimeError):
    """Training reached numbers that are not finite; the message says where."""


def diagnose(network: Network, params: Any, batch: Batch, key: jax.Array, loss: Loss,
             mesh: Mesh) -> list[str]:
    """Returns sentences that name the first places where an update's numbers are not finite.

    Repeats the update's forward and backward pass from the parameters it started with.

    Args:
        batch: the loss's batch; uses `bytes [batch, time + 1]`.
    """
    @compile_barrier
    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def inspect_update(params: Any, batch: Batch) -> tuple[Any, ...]:
        model = network.merge(params)
        ids = batch["bytes"][:, :-1].astype(jnp.int32)
        logits, activations = model.tapped(ids, Tap(record=("resid_post",)))
        grads = jax.grad(lambda p: loss(network.merge(p), batch, key)[0])(params)
        stream = activations["resid_post"].astype(jnp.float32)
        return (jnp.max(jnp.abs(stream), (1, 2, 3)), jnp.max(jnp.abs(logits)),
                jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), grads),
                jax.tree.map(lambda p: jnp.all(jnp.isfinite(p)), params))

    stream, logits, grads_finite, params_finite = jax.device_get(inspect_update(params, batch))
    sentences = []
    bad_params = _names(params_finite)
    if bad_params:
        sentences.append(f"parameters not finite before the update: {_few(bad_params)}")
    bad_blocks = np.flatnonzero(~np.isfinite(stream))
    if len(bad_blocks):
        sentences.append(f"the residual stream is not finite after block {bad_blocks[0]} of {len(stream)}")
    else:
        sentences.append(f"the residual stream is finite, at most {stream.max():.3g} "
                         f"(after block {int(stream.argmax())})")
    sentences.append(f"the logits are {'finite' if np.isfinite(logits) else 'not finite'}"
                     + (f", at most {logits:.3g}" if np.isfinite(logits) else ""))
    bad_grads = _names(grads_finite)
    if bad_grads:
        sentences.append(f"gradients not finite: {_few(bad_grads)}")
    return sentences


def _names(finite: Any) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(finite)
    return [path_name(path) for path, ok in leaves if not ok]


def _few(names: list[str], max_names: int = 5) -> str:
    more = len(names) - max_names
    return ", ".join(names[:max_names]) + (f" and {more} more" if more > 0 else "")
