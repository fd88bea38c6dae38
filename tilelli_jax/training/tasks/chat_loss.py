"""The loss of fine-tuning on pairs of a prompt and its response.

Each term is a mean over the batch:

    cross_entropy        nats per byte of the responses
    abstain              nats per prompt: binary cross-entropy of the abstain head's logit at the prompt's
                         last position; the label is 1 if the prompt has no answer
    router_entropy_loss  0 … 1 per prompt: the router's entropy divided by log(number of paths), averaged over
                         blocks and the prompt's positions; 1 minus that for a prompt without an answer
    router_kl            nats per position: KL(routing of the starting network ‖ current routing), averaged
                         over blocks
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.nn.router import divergence, entropy
from tilelli_jax.training.groups import Group, Trained, merge, select, trained_of
from tilelli_jax.training.loss import Batch, Loss, Metrics
from tilelli_jax.training.step import split_params

# The loss terms and their weights in FinetuneConfig. `router_kl` is separate: it needs the starting network.
TERMS = {"cross_entropy": "cross_entropy_weight", "abstain": "abstain_weight",
         "router_entropy_loss": "router_entropy_weight"}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Section):
    """What fine-tuning on pairs trains: parameter groups and the weights of the loss terms."""

    trainable: tuple[Group, ...] = setting(
        ("everything",), "groups of parameters to train; all others stay bit-identical. paths is "
        "conv, state, attention and dense together")
    cross_entropy_weight: float = setting(1.0, "weight of the responses' cross-entropy, in nats per byte",
                                          min=0)
    abstain_weight: float = setting(
        0.0, "weight of the abstain head's binary cross-entropy, in nats per prompt; a network without the "
        "head gets one initialised to zeros if it is trained; 0: off", min=0)
    router_entropy_weight: float = setting(
        0.0, "weight of the router-entropy term, which lowers the routers' entropy on prompts with an answer "
        "and raises it on prompts without; 0: off", min=0)
    router_kl_weight: float = setting(
        0.0, "weight of KL(starting network's routing ‖ current routing), in nats per position; not part of "
        "the validation loss; 0: off", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trainable:
            raise InputError("trainable: expected at least one group of parameters")
        if not any(getattr(self, weight) for weight in TERMS.values()):
            raise InputError(f"{', '.join(TERMS.values())}: expected a weight above 0 in one of them")
        if "abstain" in self.trainable and not self.abstain_weight:
            raise InputError("abstain_weight: expected a weight above 0 where trainable names the head, "
                             "found 0")

    @property
    def adds_head(self) -> bool:
        """Whether the run adds an abstain head to a network without one."""
        return self.abstain_weight > 0 and bool({"abstain", "everything"} & set(self.trainable))

    def weighted(self, terms: Any) -> Any:
        """Returns the weighted sum of the terms present, without `router_kl`."""
        return sum(getattr(self, weight) * terms[term] for term, weight in TERMS.items() if term in terms)


def loss_terms(model: Decoder, batch: Batch) -> tuple[Metrics, jax.Array | None]:
    """Returns the terms, summed with the batch's weights, and the routing `[blocks, batch, time, paths]` or
    None.

    The batch has the fields of `data.chat_rows.ChatBatch`. Besides `TERMS` the result has `known` and
    `unknown`, the summed weights of prompts with and without an answer; `router_entropy [blocks]`,
    `entropy_known` and `entropy_unknown` if the network has a router; `abstain_p_known` and
    `abstain_p_unknown` if it has an abstain head.
    """
    ids = batch["bytes"].astype(jnp.int32)
    tap = Tap(record=tuple(hook for hook in ("router", "abstain") if hook in model.hooks))
    logits, activations = model.tapped(ids[:, :-1], tap)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    unanswerable = batch["unanswerable"]
    classes = {"known": ~unanswerable, "unknown": unanswerable}
    terms = {"cross_entropy": jnp.sum(batch["response"] * nats)}
    terms |= {name: jnp.sum(jnp.where(members, batch["last"], 0)) for name, members in classes.items()}
    if "abstain" in activations:
        logit = activations["abstain"]
        terms["abstain"] = jnp.sum(batch["last"] * optax.sigmoid_binary_cross_entropy(
            logit, unanswerable.astype(jnp.float32)))
        terms |= {f"abstain_p_{name}": jnp.sum(jnp.where(members, batch["last"], 0) * jax.nn.sigmoid(logit))
                  for name, members in classes.items()}
    if "router" in activations:
        entropies = entropy(activations["router"])
        mean = entropies.mean(0)
        terms["router_entropy_loss"] = jnp.sum(batch["prompt"] * jnp.where(unanswerable, 1 - mean, mean))
        terms["router_entropy"] = jnp.sum(batch["prompt"] * entropies, (1, 2))
        terms |= {f"entropy_{name}": jnp.sum(jnp.where(members, batch["prompt"], 0) * mean)
                  for name, members in classes.items()}
    return terms, activations.get("router")


@dataclasses.dataclass(frozen=True)
class ChatLoss(Loss):
    """The weighted sum of the terms. An update trains the configured groups of parameters.

    The batch is one of `data.chat_rows.training_rows`; with `router_kl_weight` it also has `start`, the
    trained parameters' starting values. Metrics: `loss` (the objective), `nats`, `abstain`,
    `router_entropy_loss`, `router_kl` and `router_entropy [blocks]`, as far as the network has them.
    """

    config: FinetuneConfig

    def __call__(self, model: Decoder, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # no randomness
        terms, routing = loss_terms(model, batch)
        total = self.config.weighted(terms)
        metrics = {"nats": terms["cross_entropy"]} | {
            name: terms[name] for name in ("abstain", "router_entropy_loss", "router_entropy")
            if name in terms}
        if self.config.router_kl_weight:
            assert routing is not None
            metrics["router_kl"] = _router_kl(model, batch, routing)
            total = total + self.config.router_kl_weight * metrics["router_kl"]
        return total, metrics | {"loss": total}

    @property
    def trained(self) -> Trained:
        return trained_of(self.config.trainable)

    def initial_loss_state(self, params: Any) -> Any:
        """Keeps the trained parameters' starting values for `router_kl`."""
        return select(params, self.trained) if self.config.router_kl_weight else ()

    def extra_batch(self, loss_state: Any, step: jax.Array) -> Batch:
        del step
        return {"start": loss_state} if self.config.router_kl_weight else {}


def _router_kl(model: Decoder, batch: Batch, routing: jax.Array) -> jax.Array:
    """Returns KL(starting routing ‖ current routing) in nats, averaged over positions and blocks."""
    network, params = split_params(model)
    start_params: Any = batch["start"]
    start = network.merge(merge(params, start_params))
    before = start.tapped(batch["bytes"][:, :-1].astype(jnp.int32), Tap(record=("router",)))[1]["router"]
    return jnp.sum(batch["inside"] * divergence(jax.lax.stop_gradient(before), routing).mean(0))
