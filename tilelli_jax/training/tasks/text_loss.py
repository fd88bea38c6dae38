"""The loss of language models: next-byte cross-entropy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from tilelli_jax.models.decoder import Decoder
from tilelli_jax.nn.hooks import OFF, Tap
from tilelli_jax.nn.router import entropy, load_balance_loss
from tilelli_jax.training.loss import Batch, Loss, Metrics

ROUTER = Tap(record=("router",))


@dataclasses.dataclass(frozen=True)
class NextByteLoss(Loss):
    """Mean next-byte cross-entropy in nats, plus `load_balance_weight` times the load-balance loss.

    Batch: `bytes [batch, time + 1]` uint8. Metrics: `loss` (the cross-entropy alone); for routed networks
    also `load_balance`, `router_use [blocks, paths]` and `router_entropy [blocks]` (0 … 1).
    """

    load_balance_weight: float

    def __call__(self, model: Decoder, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # no dropout
        ids = batch["bytes"].astype(jnp.int32)
        logits, activations = model.tapped(ids[:, :-1], ROUTER if "router" in model.hooks else OFF)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
        if "router" not in activations:
            return nats, {"loss": nats}
        weights = activations["router"]
        balance = load_balance_loss(weights)
        return nats + self.load_balance_weight * balance, {
            "loss": nats, "load_balance": balance,
            "router_use": weights.mean((1, 2)), "router_entropy": entropy(weights).mean((1, 2))}


def next_byte_nats(model: Decoder, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy in nats, summed over `mask [batch, time]`, and the number of positions."""
    ids, mask = batch["bytes"].astype(jnp.int32), batch["mask"].astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:])
    return jnp.sum(nats * mask), jnp.sum(mask)
