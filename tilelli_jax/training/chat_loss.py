"""What fine-tuning on pairs is to reach: to answer, to say when it cannot, to be unsure where it should be.

All terms are means over a batch, each in units of its own:

    cross-entropy    nats per byte, of the bytes of responses
    abstain          nats per prompt: the abstain head's logit at the last position of a prompt, whether the
                     prompt has no answer
    router_entropy_loss    0 … 1 per prompt: the router's entropy over log n, mean over blocks and the prompt's
                     positions, of a prompt with an answer; 1 minus that, of one without
    tether           nats per position: KL(the starting network's routing ‖ this one's), mean over blocks
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.nn.router import divergence, entropy
from tilelli_jax.nn.tap import Tap
from tilelli_jax.training.groups import Group, merge, select, trained_of
from tilelli_jax.training.losses import Batch, Loss
from tilelli_jax.training.step import Metrics, UpdateHooks, split_params

# The loss terms and their weights in FinetuneConfig; `router_kl` besides, which needs the starting network.
TERMS = {"cross_entropy": "cross_entropy_weight", "abstain": "abstain_weight",
         "router_entropy_loss": "router_entropy_weight"}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Section):
    """What fine-tuning on pairs trains, and its losses by their weights."""

    train: tuple[Group, ...] = setting(
        ("everything",), "groups of parameters that are trained; all others keep every bit. paths: conv, "
        "state, attention and dense together")
    cross_entropy_weight: float = setting(1.0, "weight of the cross-entropy of responses", min=0)
    abstain_weight: float = setting(
        0.0, "weight of the abstain head's cross-entropy; a network without the head gets one of zeros "
        "where that is trained", min=0)
    router_entropy_weight: float = setting(
        0.0, "weight of the routers' entropy: down over prompts with an answer, up over those without",
        min=0)
    router_kl_weight: float = setting(
        0.0, "weight of the divergence of the routing from that of the starting network; no part of the "
        "validation loss", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise InputError("train: expected at least one group of parameters")
        if not any(getattr(self, weight) for weight in TERMS.values()):
            raise InputError(f"{', '.join(TERMS.values())}: expected a weight above 0 in one of them")
        if "abstain" in self.train and not self.abstain_weight:
            raise InputError("abstain_weight: expected a weight above 0 where train names the head, found 0")

    @property
    def adds_head(self) -> bool:
        """Whether a network without an abstain head gets one."""
        return self.abstain_weight > 0 and bool({"abstain", "everything"} & set(self.train))

    def weighted(self, terms: Any) -> Any:
        """The terms that there are, by their weights, added up; without the tether."""
        return sum(getattr(self, weight) * terms[term] for term, weight in TERMS.items() if term in terms)


def terms_of(model: Decoder, batch: Batch) -> tuple[Metrics, jax.Array | None]:
    """The sums of the terms by the batch's weights, and the routing `[blocks, batch, time, paths]`.

    Batch: as `data.chat_pairs.ChatBatch`. Beside `TERMS`, as far as the network has a router or a head:
    `router_entropy [blocks]`; and of prompts with an answer, `known`, and of those without, `unknown`: the
    sum of their weights, `entropy_known` …, `abstain_p_known` ….
    """
    ids = batch["bytes"].astype(jnp.int32)
    tap = Tap(record=tuple(place for place in ("router", "abstain") if place in model.places))
    logits, seen = model.tapped(ids[:, :-1], tap)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    unanswerable = batch["unanswerable"]
    classes = {"known": ~unanswerable, "unknown": unanswerable}
    found = {"cross_entropy": jnp.sum(batch["response"] * nats)}
    found |= {name: jnp.sum(jnp.where(there, batch["last"], 0)) for name, there in classes.items()}
    if "abstain" in seen:
        logit = seen["abstain"]
        found["abstain"] = jnp.sum(batch["last"] * optax.sigmoid_binary_cross_entropy(
            logit, unanswerable.astype(jnp.float32)))
        found |= {f"abstain_p_{name}": jnp.sum(jnp.where(there, batch["last"], 0) * jax.nn.sigmoid(logit))
                  for name, there in classes.items()}
    if "router" in seen:
        each = entropy(seen["router"])
        mean = each.mean(0)
        found["router_entropy_loss"] = jnp.sum(batch["prompt"] * jnp.where(unanswerable, 1 - mean, mean))
        found["router_entropy"] = jnp.sum(batch["prompt"] * each, (1, 2))
        found |= {f"entropy_{name}": jnp.sum(jnp.where(there, batch["prompt"], 0) * mean)
                  for name, there in classes.items()}
    return found, seen.get("router")


def chat_loss(config: FinetuneConfig) -> Loss:
    """The terms by their weights.

    Batch: as of `data.chat_pairs.training_rows`, and with a tether `start`, what is trained as it was.
    Reported: `loss`, which is the objective, and every term under its name: `nats`, `abstain`,
    `router_entropy_loss`, `router_kl`; and `router_entropy [blocks]`.
    """
    def loss(model: Decoder, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # nothing is drawn
        terms, routing = terms_of(model, batch)
        total = config.weighted(terms)
        told = {"nats": terms["cross_entropy"]} | {
            name: terms[name] for name in ("abstain", "router_entropy_loss", "router_entropy") if name in terms}
        if config.router_kl_weight:
            assert routing is not None
            told["router_kl"] = _drift(model, batch, routing)
            total = total + config.router_kl_weight * told["router_kl"]
        return total, told | {"loss": total}
    return loss


def tethered(config: FinetuneConfig) -> UpdateHooks:
    """What an update does besides: some parameters only, and the starting ones at hand for a tether."""
    trained = trained_of(config.train)
    if not config.router_kl_weight:
        return UpdateHooks(trained=trained)
    return UpdateHooks(trained=trained, memory=functools.partial(select, trained=trained),
                extra_batch=lambda state: {"start": state.memory})


def _drift(model: Decoder, batch: Batch, routing: jax.Array) -> jax.Array:
    """Mean over positions and blocks of KL(before ‖ now), in nats."""
    network, params = split_params(model)
    start_params: Any = batch["start"]
    start = network.merge(merge(params, start_params))
    before = start.tapped(batch["bytes"][:, :-1].astype(jnp.int32), Tap(record=("router",)))[1]["router"]
    return jnp.sum(batch["inside"] * divergence(jax.lax.stop_gradient(before), routing).mean(0))
