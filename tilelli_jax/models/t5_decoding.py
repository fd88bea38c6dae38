"""Decoding of a T5 network: one jitted loop, with caches and an optional tap on the encoder."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.models.causal_lm import check_ids
from tilelli_jax.models.sampling import sample
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration
from tilelli_jax.nn.hooks import OFF, MakeTap


@functools.partial(jax.jit, static_argnames=("graph", "aux_graph", "make_tap", "n", "greedy"))
def _decode(graph: Any, params: Any, aux_graph: Any, aux_params: Any, make_tap: MakeTap | None,
            ids: jax.Array, mask: jax.Array, metadata: jax.Array, keys: jax.Array,
            sampling: tuple[jax.Array, ...], banned: jax.Array, *, n: int, greedy: bool) -> jax.Array:
    model = nnx.merge(graph, params)
    aux_model = None if aux_graph is None else nnx.merge(aux_graph, aux_params)
    tap = OFF if make_tap is None else make_tap(aux_model, metadata)
    rows = len(keys)

    def decode_token(i: jax.Array, carry: Any) -> Any:
        new, last, cache = carry
        logits, cache = model.step(last, cache, i)
        logits = jnp.where(banned, -jnp.inf, logits)
        if greedy:
            last = jnp.argmax(logits, -1).astype(jnp.int32)
        else:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
            last = jax.vmap(lambda key, row: sample(key, row, *sampling))(step_keys, logits)
        return new.at[:, i].set(last), last, cache

    start = jnp.full(rows, model.config.start_id, jnp.int32)
    empty = jnp.zeros((rows, n), jnp.int32)
    cache = model.start(ids, mask, n, tap, rows // len(ids))
    return jax.lax.fori_loop(0, n, decode_token, (empty, start, cache))[0]


def continue_ids(model: FlaxT5ForConditionalGeneration, ids: jax.Array, mask: jax.Array | None = None, *,
                 n: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
                 banned: tuple[int, ...] = (), copies: int = 1, rows: jax.Array | None = None,
                 make_tap: MakeTap | None = None, aux_model: Any = None,
                 metadata: jax.Array | None = None) -> jax.Array:
    """Decodes n tokens for each row, int32 `[batch · copies, n]`, with caches in one jitted loop.

    Args:
        temperature: 0 takes the most likely token; see `sampling.Sampling` for top_k and top_p.
        banned: tokens that are never decoded.
        copies: number of continuations of each row of ids, in consecutive rows; each row is encoded once.
        rows: int `[batch · copies]`, index of each continuation in the random stream; continuations with
            the same index use the same random numbers. Default: 0, 1, ….
        make_tap: (aux_model, metadata) → tap that edits the encoder's activations. A different function
            object is compiled again; pass values that change between calls in `metadata`.
        aux_model: a second network that the tap uses, for example an autoencoder.
        metadata: int32 `[batch, n]`, values for the tap for each row of ids.

    Raises:
        ValueError: ids are outside the vocabulary, copies, rows or metadata do not match them, or the
            encoder has no such hook or layer.
    """
    check_ids("ids", ids, model.config.vocab_size)
    if copies < 1:
        raise ValueError(f"copies: expected at least 1, found {copies}")
    rows = jnp.arange(copies * len(ids)) if rows is None else rows
    if jnp.shape(rows) != (copies * len(ids),):
        raise ValueError(f"rows: expected [{copies * len(ids)}], found {list(jnp.shape(rows))}")
    metadata = jnp.zeros((len(ids), 0), jnp.int32) if metadata is None else metadata
    if jnp.ndim(metadata) != 2 or len(metadata) != len(ids):
        raise ValueError(f"metadata: expected [{len(ids)}, n], found {list(jnp.shape(metadata))}")
    graph, params = nnx.split(model)
    aux_graph, aux_params = (None, None) if aux_model is None else nnx.split(aux_model)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows)
    banned_mask = jnp.zeros(model.config.vocab_size, bool).at[jnp.array(banned, jnp.int32)].set(True)
    mask = jnp.ones(ids.shape, bool) if mask is None else mask
    sampling = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    return _decode(graph, params, aux_graph, aux_params, make_tap, ids, mask, metadata, keys, sampling,
                   banned_mask, n=n, greedy=temperature == 0)
