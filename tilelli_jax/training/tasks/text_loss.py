"""Losses: functions (model, batch, key) → (scalar to minimise, metrics to report)."""

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
    """Returns the loss: mean next-byte cross-entropy in nats, plus `load_balance` times the load-balance
    loss.

    Batch: `bytes [batch, time + 1]` uint8. Metrics: `loss` (the cross-entropy alone); for routed networks
    also `load_balance`, `router_use [blocks, paths]` and `router_entropy [blocks]` (0 … 1).
    """
    def loss(model: Decoder, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key  # no dropout
        ids = batch["bytes"].astype(jnp.int32)
        logits, activations = model.tapped(ids[:, :-1], ROUTER if "router" in model.places else OFF)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
        if "router" not in activations:
            return nats, {"loss": nats}
        weights = activations["router"]
        balance = load_balance_loss(weights)
        return nats + load_balance * balance, {
            "loss": nats, "load_balance": balance,
            "router_use": weights.mean((1, 2)), "router_entropy": entropy(weights).mean((1, 2))}
    return loss


def next_byte_nats(model: Decoder, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy in nats, summed over `mask [batch, time]`, and the number of positions."""
    ids, mask = batch["bytes"].astype(jnp.int32), batch["mask"].astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:])
    return jnp.sum(nats * mask), jnp.sum(mask)
