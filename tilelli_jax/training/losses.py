"""Losses: a model and a batch in, a scalar and what there is to report out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tilelli_jax.models.decoder import Decoder
from tilelli_jax.nn.router import entropy, load_balance_loss
from tilelli_jax.nn.tap import OFF, Tap

Batch = dict[str, jax.Array]
ROUTER = Tap(record=("router",))
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def next_byte_loss(load_balance: float) -> Loss:
    """Mean cross-entropy of the next byte, in nats, plus the routers' load balance by that weight.

    Batch: `bytes [batch, time + 1]` uint8. Reported: `loss` (the cross-entropy alone); for routed
    networks `load_balance`, `router_use [blocks, paths]` and `router_entropy [blocks]` (0 … 1).
    """
    def loss(model: Decoder, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key  # no dropout
        ids = batch["bytes"].astype(jnp.int32)
        logits, seen = model.tapped(ids[:, :-1], ROUTER if "router" in model.places else OFF)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
        if "router" not in seen:
            return nats, {"loss": nats}
        weights = seen["router"]
        balance = load_balance_loss(weights)
        return nats + load_balance * balance, {
            "loss": nats, "load_balance": balance,
            "router_use": weights.mean((1, 2)), "router_entropy": entropy(weights).mean((1, 2))}
    return loss


def next_byte_nats(model: Decoder, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy in nats over the positions of `mask [batch, time]`, and their number."""
    ids, mask = batch["bytes"].astype(jnp.int32), batch["mask"].astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:])
    return jnp.sum(nats * mask), jnp.sum(mask)
