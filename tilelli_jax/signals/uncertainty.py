"""How unsure a network is of a prompt: softmax, router, abstain head and logit lens, in one pass.

Nothing is generated. What each signal is called stands in `signals.names`.
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
from tilelli_jax.nn.router import divergence, entropy
from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import Mesh
from tilelli_jax.signals.crystallisation import OVERALL
from tilelli_jax.signals.lens import CHUNK
from tilelli_jax.signals.names import BLOCK, HEAD, LENS, OF_PROMPT, ROUTER
from tilelli_jax.signals.places import check_place
from tilelli_jax.signals.prompts import Prompt, PromptReader, PromptSignals, places_of

BUCKET = 64  # prompts are many and short here


class Uncertainty(NamedTuple):
    """Of one prompt, all f32; None where the network has no such part, or it was not asked for.

    Attributes:
        max_softmax_last: largest probability of the next token, after the prompt.
        max_softmax_mean: the same, the mean over the prompt's positions.
        router_entropy: of the pathways' weights over log n, 0 … 1, mean over blocks and positions.
        router_entropy_var: its variance over blocks and positions.
        router_entropy_block: `[blocks]`, its mean over positions.
        drift: KL(another network's routing ‖ this one's) in nats, mean over blocks and positions.
        abstain_logit: of the abstain head at the last position.
        read: logit lens and stream (`signals.prompts.Read`).
        hidden: `[d_model]`, the stream after the final norm, at the last position.
        pooled: `[d_model]`, its mean over the prompt's positions.
        codes: of an autoencoder at the last position.
    """

    max_softmax_last: Any
    max_softmax_mean: Any
    router_entropy: Any
    router_entropy_var: Any
    router_entropy_block: Any
    drift: Any
    abstain_logit: Any
    read: Any
    hidden: Any
    pooled: Any
    codes: Codes | None

    @property
    def router_conf(self) -> Any:
        """1 − router_entropy."""
        return None if self.router_entropy is None else 1 - self.router_entropy

    @property
    def abstain_p(self) -> Any:
        """The chance that the abstain head gives to there being no answer."""
        return None if self.abstain_logit is None else 1 / (1 + np.exp(-np.float64(self.abstain_logit)))


def by_name(found: Uncertainty) -> dict[str, np.ndarray]:
    """Every signal that was read, f64 `[prompts]` each, of what `UncertaintyReader.read` gave.

    None of them depends on where in a prompt the question stands.
    """
    columns = {name: getattr(found, name) for name in OF_PROMPT}
    if found.router_entropy_block is not None:
        columns |= {f"{BLOCK}{i}": values for i, values in enumerate(found.router_entropy_block.T)}
    if found.read is not None:
        overall = found.read.crystallisation.overall
        columns |= {name: overall[:, OVERALL.index(feature)] for name, feature in LENS.items()}
    return {name: np.asarray(values, np.float64) for name, values in columns.items() if values is not None}


def names(model: Any) -> tuple[str, ...]:
    """What `by_name` gives of a network that is read alone, without another one to drift from."""
    routed = "router" in model.places
    lacks = {"drift", *(() if routed else ROUTER), *(() if "abstain" in model.places else (HEAD,))}
    blocks = [f"{BLOCK}{i}" for i in range(model.config.n_layers)] if routed else []
    return (*(name for name in OF_PROMPT if name not in lacks), *blocks, *LENS)


@dataclasses.dataclass(frozen=True)
class UncertaintyPass(PromptSignals):
    """All that the signals need is recorded at every position.

    Attributes:
        before: whether another network's routing is at hand; `codes`: whether an autoencoder is; `lens`:
            whether `read` is wanted.
    """

    before: bool = False
    codes: bool = False
    lens: bool = True

    def __call__(self, ids: jax.Array, positions: jax.Array, question: jax.Array, model: Any,
                 *aids: Any) -> Uncertainty:
        others = list(aids)
        before = others.pop(0) if self.before else None
        sae = others.pop(0) if self.codes else None
        last = positions[:, -1]
        inside = jnp.arange(ids.shape[1]) <= last[:, None]
        of_lens = [place for place in self.places if place] if self.lens else []
        places = {*of_lens, "hidden"}
        places |= {place for place in ("router", "abstain") if place in model.places}
        places |= {sae.config.place} if sae is not None else set()
        logits, seen = model.tapped(ids, Tap(record=tuple(sorted(places))))

        def at_last(value: jax.Array) -> jax.Array:
            return jnp.take_along_axis(value, last.reshape(-1, *(1,) * (value.ndim - 1)), axis=1)[:, 0]

        def mean(value: jax.Array) -> jax.Array:
            weights = inside / inside.sum(1, keepdims=True)
            return jnp.einsum("bt,bt...->b...", weights, value.astype(jnp.float32))
        largest = jnp.exp(jnp.max(logits, -1) - jax.nn.logsumexp(logits, -1))
        routing = seen.get("router")
        by_block = spread = drift = None
        if routing is not None:
            each = entropy(routing)  # [blocks, batch, time]
            by_block = jax.vmap(mean)(each).T
            centred = each - by_block.mean(1)[None, :, None]
            spread = jax.vmap(mean)(jnp.square(centred)).mean(0)
        if before is not None:
            start = before.tapped(ids, Tap(record=("router",)))[1]["router"]
            drift = jnp.maximum(mean(divergence(start, routing).mean(0)), 0)  # rounded, it may be below
        index = positions[None, :, :, None]
        inner = {place: jnp.take_along_axis(seen[place], index, axis=2) for place in of_lens}
        codes = None if sae is None else sae.encode(at_last(seen[sae.config.place][sae.config.layer]))
        return Uncertainty(
            at_last(largest), mean(largest), None if by_block is None else by_block.mean(1), spread, by_block,
            drift, at_last(seen["abstain"]) if "abstain" in seen else None,
            self.crystallised(model, inner, question) if self.lens else None,
            at_last(seen["hidden"]).astype(jnp.float32), mean(seen["hidden"]), codes)


class UncertaintyReader(PromptReader):
    """Reads prompts with one network, and keeps what was compiled for the next call.

    Args:
        sae: an autoencoder whose codes are wanted; its configuration says of what place and layer.
        before: a routed network from whose routing the drift is measured.
        lens: whether `read` is wanted, which takes longer to compile than all the rest.
        batch_size, chunk, mesh: see `Reader`.

    Raises:
        InputError: the networks are not of the same blocks, or the autoencoder is of no place here.
    """

    def __init__(self, model: Any, *, sae: TopKSAE | None = None, before: Any = None, batch_size: int = 16,
                 chunk: int = CHUNK, mesh: Mesh | None = None, lens: bool = True) -> None:
        if before is not None and _routing(before) != _routing(model):
            raise InputError(f"before: expected a network routed alike, {_routing(model)}, found "
                             f"{_routing(before)}")
        if sae is not None:
            check_place(model, sae.config.place, sae.config.layer)
        logit_lens = UncertaintyPass(places_of(model), chunk, before=before is not None, codes=sae is not None,
                               lens=lens)
        super().__init__(model, batch_size=batch_size, chunk=chunk, mesh=mesh, bucket=BUCKET, look=logit_lens,
                         aids=[aux_model for aux_model in (before, sae) if aux_model is not None])

    def read(self, prompts: Sequence[Prompt], what: str = "reading") -> Uncertainty:
        """All prompts in their order: every array has a leading axis `[prompts]`.

        Raises:
            ValueError: see `Reader.__call__`; or there are none.
        """
        if not prompts:
            raise ValueError("prompts: expected at least one")
        found = dict(self(prompts, what))
        return jax.tree.map(lambda *one: np.stack(one), *(found[i] for i in range(len(prompts))))


def _routing(model: Any) -> tuple[int, int] | None:
    """Blocks and pathways of a routed network."""
    if "router" not in model.places or not hasattr(model.config, "pathways"):
        return None
    return model.config.n_layers, len(model.config.pathways) * model.config.n_banks
