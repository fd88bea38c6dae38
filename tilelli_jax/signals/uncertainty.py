"""Uncertainty signals of a prompt from one forward pass: softmax, router, abstain head and logit lens.

Nothing is generated. `signals.names` defines the signals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import Codes, TopKSAE
from tilelli_jax.nn.hooks import Tap, check_hook
from tilelli_jax.nn.router import divergence, entropy
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.signals.crystallisation import PROMPT_FEATURES
from tilelli_jax.signals.lens import CHUNK
from tilelli_jax.signals.names import BLOCK, LENS, SIGNALS
from tilelli_jax.signals.prompts import PromptIds, PromptReader, PromptSignals, lens_hooks

SHORTEST = 64  # padded length of shorter prompts: they are many, and their networks small


class Uncertainty(NamedTuple):
    """Signals of one prompt, all f32; None if the network has no such part or it was not requested.

    Attributes:
        max_softmax_last: largest next-token probability at the last position.
        max_softmax_mean: largest next-token probability, mean over the prompt's positions.
        router_entropy: entropy of the pathway weights over log n, 0 … 1, mean over blocks and positions.
        router_entropy_var: variance of the router entropy over blocks and positions.
        router_entropy_block: `[blocks]`, router entropy of each block, mean over positions.
        drift: KL(another network's routing ‖ this network's routing) in nats, mean over blocks and positions.
        abstain_logit: logit of the abstain head at the last position.
        lens: logit lens and residual stream (`signals.prompts.PromptOutputs`).
        hidden: `[d_model]`, the residual stream after the final norm, at the last position.
        pooled: `[d_model]`, the same, mean over the prompt's positions.
        codes: codes of an autoencoder at the last position.
    """

    max_softmax_last: Any
    max_softmax_mean: Any
    router_entropy: Any
    router_entropy_var: Any
    router_entropy_block: Any
    drift: Any
    abstain_logit: Any
    lens: Any
    hidden: Any
    pooled: Any
    codes: Codes | None

    @property
    def router_conf(self) -> Any:
        """1 − router_entropy."""
        return None if self.router_entropy is None else 1 - self.router_entropy

    @property
    def abstain_p(self) -> Any:
        """The probability that the abstain head assigns to abstaining."""
        return None if self.abstain_logit is None else 1 / (1 + np.exp(-np.float64(self.abstain_logit)))


def signal_columns(signals: Uncertainty) -> dict[str, np.ndarray]:
    """Every available signal in the result of `UncertaintyReader.read`, f64 `[prompts]` each.

    The keys are those of `signals.names`. No signal depends on the position of the question in the prompt.
    """
    columns = {name: getattr(signals, name) for name in SIGNALS if name not in LENS}
    if signals.router_entropy_block is not None:
        columns |= {f"{BLOCK}{i}": values for i, values in enumerate(signals.router_entropy_block.T)}
    if signals.lens is not None:
        prompt_features = signals.lens.crystallisation.prompt_features
        columns |= {name: prompt_features[:, PROMPT_FEATURES.index(feature)]
                    for name, feature in LENS.items()}
    return {name: np.asarray(values, np.float64) for name, values in columns.items() if values is not None}


@dataclasses.dataclass(frozen=True)
class UncertaintyPass(PromptSignals):
    """Computes the uncertainty signals of a batch; records activations at every position.

    Attributes:
        before: whether a network is passed whose routing is the reference of the drift.
        codes: whether an autoencoder is passed.
        lens: whether to compute `Uncertainty.lens`.
    """

    before: bool = False
    codes: bool = False
    lens: bool = True

    def __call__(self, ids: jax.Array, positions: jax.Array, question: jax.Array, model: Any,
                 *aux_models: Any) -> Uncertainty:
        remaining = list(aux_models)
        before = remaining.pop(0) if self.before else None
        sae = remaining.pop(0) if self.codes else None
        last = positions[:, -1]
        unpadded = jnp.arange(ids.shape[1]) <= last[:, None]
        at_positions = [hook for hook in self.hooks if hook] if self.lens else []
        hooks = {*at_positions, "hidden"}
        hooks |= {hook for hook in ("router", "abstain") if hook in model.hooks}
        hooks |= {sae.config.hook} if sae is not None else set()
        logits, recorded = model.tapped(ids, Tap(record=tuple(sorted(hooks))))

        def at_last(value: jax.Array) -> jax.Array:
            return jnp.take_along_axis(value, last.reshape(-1, *(1,) * (value.ndim - 1)), axis=1)[:, 0]

        def mean(value: jax.Array) -> jax.Array:
            weights = unpadded / unpadded.sum(1, keepdims=True)
            return jnp.einsum("bt,bt...->b...", weights, value.astype(jnp.float32))
        largest = jnp.exp(jnp.max(logits, -1) - jax.nn.logsumexp(logits, -1))
        routing = recorded.get("router")
        by_block = variance = drift = None
        if routing is not None:
            entropies = entropy(routing)  # [blocks, batch, time]
            by_block = jax.vmap(mean)(entropies).T
            centred = entropies - by_block.mean(1)[None, :, None]
            variance = jax.vmap(mean)(jnp.square(centred)).mean(0)
        if before is not None:
            reference = before.tapped(ids, Tap(record=("router",)))[1]["router"]
            # Rounding errors may make the divergence negative.
            drift = jnp.maximum(mean(divergence(reference, routing).mean(0)), 0)
        index = positions[None, :, :, None]
        selected = {hook: jnp.take_along_axis(recorded[hook], index, axis=2) for hook in at_positions}
        codes = None if sae is None else sae.encode(at_last(recorded[sae.config.hook][sae.config.layer]))
        return Uncertainty(
            at_last(largest), mean(largest), None if by_block is None else by_block.mean(1), variance,
            by_block, drift, at_last(recorded["abstain"]) if "abstain" in recorded else None,
            self.prompt_outputs(model, selected, question) if self.lens else None,
            at_last(recorded["hidden"]).astype(jnp.float32), mean(recorded["hidden"]), codes)


class UncertaintyReader(PromptReader):
    """Computes the uncertainty signals of prompts; the compiled program is reused between calls.

    Args:
        sae: an autoencoder whose codes to compute; its configuration names the hook and the layer.
        before: a routed network whose routing is the reference of the drift.
        lens: whether to compute `Uncertainty.lens`, which takes longer to compile than all other signals.
        batch_size, chunk, mesh: see `PromptReader`.

    Raises:
        InputError: the two networks differ in blocks or pathways.
        ValueError: the network lacks the autoencoder's hook or layer.
    """

    def __init__(self, model: Any, *, sae: TopKSAE | None = None, before: Any = None, batch_size: int = 16,
                 chunk: int = CHUNK, mesh: Mesh | None = None, lens: bool = True) -> None:
        if before is not None and _routing(before) != _routing(model):
            raise InputError(f"before: expected a network with the same blocks and pathways, "
                             f"{_routing(model)}, found {_routing(before)}")
        if sae is not None:
            check_hook(model, sae.config.hook, sae.config.layer)
        signals = UncertaintyPass(lens_hooks(model), chunk, before=before is not None, codes=sae is not None,
                                  lens=lens)
        super().__init__(model, batch_size=batch_size, chunk=chunk, mesh=mesh, signals=signals,
                         shortest=SHORTEST,
                         aux_models=[aux_model for aux_model in (before, sae) if aux_model is not None])

    def read(self, prompts: Sequence[PromptIds], label: str = "reading") -> Uncertainty:
        """Signals of all prompts, in order: every array has a leading axis `[prompts]`.

        Raises:
            ValueError: there are no prompts, or see `PromptReader.__call__`.
        """
        if not prompts:
            raise ValueError("prompts: expected at least one")
        by_index = dict(self(prompts, label))
        return jax.tree.map(lambda *arrays: np.stack(arrays), *(by_index[i] for i in range(len(prompts))))


def _routing(model: Any) -> tuple[int, int] | None:
    """Numbers of blocks and pathways of a routed network; None for other networks."""
    if "router" not in model.hooks or not hasattr(model.config, "pathways"):
        return None
    return model.config.n_layers, len(model.config.pathways) * model.config.n_banks
