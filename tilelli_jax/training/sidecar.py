"""Learning whether a network knows: Recall's sidecar, fitted to features and what came of the questions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tilelli_jax import interrupts
from tilelli_jax.config import Section, setting
from tilelli_jax.estimators.sidecar import Sidecar, SidecarConfig

MIN_SPREAD = 1e-6  # added to a feature's standard deviation


@dataclasses.dataclass(frozen=True)
class SidecarOptions(Section):
    """How a sidecar is learned; the defaults are the published ones but for `balance`."""

    d_hidden: int = setting(96, "width of the GRU's state and of the head", min=1)
    epochs: int = setting(120, "at most", min=1)
    patience: int = setting(20, "epochs without a gain on the validation questions, after which it ends",
                            min=1)
    learning_rate: float = setting(1e-3, "of Adam", above=0)
    weight_decay: float = setting(1e-4, "added to the gradient, as Adam's own is", min=0)
    dropout: float = setting(0.1, "share of the head's values that are left out", min=0, below=1)
    batch_size: int = setting(128, "questions at once", min=1)
    balance: Literal["none", "weights"] = setting(
        "none", "weights: known questions weigh as much as the others, as published; it shifts the logits")


class Examples(NamedTuple):
    """`features` `[n, layers, n_features]`, `whole` `[n, n_globals]`; `known` `[n]`, 0 or 1."""

    features: np.ndarray
    whole: np.ndarray
    known: np.ndarray


class Learned(NamedTuple):
    """The sidecar of the best epoch (counted from 1), and the validation score of each."""

    sidecar: Sidecar
    best: int
    scores: list[float]


def learn(train: Examples, validate: Examples, score: Callable[[np.ndarray, np.ndarray], float],
          options: SidecarOptions = SidecarOptions(), *, names: Sequence[str] = (),
          names_whole: Sequence[str] = (), seed: int = 0) -> Learned:
    """Adam on the binary cross-entropy; what is kept is the epoch whose validation score is the highest.

    The scalers are fitted to the training questions. The same seed gives the same sidecar on a machine.

    Args:
        score: of `known` `[questions]` and logits `[questions]`: the higher, the better.
        names, names_whole: of the features, stored with the sidecar.

    Raises:
        ValueError: a part has one class only, a feature is not finite, or what is learned is not.
    """
    for name, part in (("train", train), ("validate", validate)):
        if len(np.unique(part.known)) < 2:
            raise ValueError(f"{name}: expected known and unknown questions, found one kind only")
        if not (np.isfinite(part.features).all() and np.isfinite(part.whole).all()):
            raise ValueError(f"{name}: a feature is not finite")
    config = SidecarConfig(n_features=train.features.shape[-1], n_globals=train.whole.shape[-1],
                           d_hidden=options.d_hidden, features=tuple(names), globals=tuple(names_whole))
    sidecar = Sidecar(config, rngs=nnx.Rngs(seed))
    fit_scalers(sidecar, train)
    graph, params, buffers = nnx.split(sidecar, nnx.Param, ...)  # type: ignore[misc]
    n, known = len(train.known), train.known.astype(np.float32)
    weights = np.ones(n, np.float32)
    if options.balance == "weights":
        weights[known == 1] = (n - known.sum()) / known.sum()
    data = jax.tree.map(jnp.asarray, (train.features, train.whole, known, weights))
    held = jax.tree.map(jnp.asarray, (validate.features, validate.whole))

    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    rows = min(options.batch_size, n)
    steps = -(-n // rows)
    counted = (np.arange(steps * rows) < n).astype(np.float32).reshape(steps, rows)
    state, best, scores = _optimizer(options).init(params), params, []
    for number in range(options.epochs):
        interrupts.raise_if_received()
        order = np.resize(rng.permutation(n), (steps, rows))
        params, state, logits = _epoch(graph, options, buffers, params, state, data, held, order, counted,
                                       jax.random.fold_in(key, number))
        if not np.isfinite(logits).all():
            raise ValueError(f"seed {seed}: after epoch {number + 1} its logits are not finite; a smaller "
                             "learning_rate may help")
        scores.append(score(validate.known, np.asarray(logits, np.float64)))
        if number == int(np.argmax(scores)):
            best = params
        elif number - int(np.argmax(scores)) >= options.patience:
            break
    return Learned(nnx.merge(graph, best, buffers), int(np.argmax(scores)) + 1, scores)


def fit_scalers(sidecar: Sidecar, train: Examples) -> None:
    """Mean and spread of every feature (over the layers, too) and of those of the whole."""
    features = train.features.reshape(-1, train.features.shape[-1]).astype(np.float64)
    sidecar.feature_scaler.mean[...] = jnp.asarray(features.mean(axis=0), jnp.float32)
    sidecar.feature_scaler.scale[...] = jnp.asarray(features.std(axis=0) + MIN_SPREAD, jnp.float32)
    whole = train.whole.astype(np.float64)
    spread = whole.std(axis=0)
    sidecar.global_scaler.mean[...] = jnp.asarray(whole.mean(axis=0), jnp.float32)
    sidecar.global_scaler.scale[...] = jnp.asarray(np.where(spread > 0, spread, 1.0), jnp.float32)


def logits_of(sidecar: Sidecar, features: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Logits over the temperature, f64 `[questions]`: P(knows) is their sigmoid."""
    graph, params = nnx.split(sidecar)
    found = _logits(graph, params, jnp.asarray(features, jnp.float32), jnp.asarray(whole, jnp.float32))
    return np.asarray(found, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, params: Any, features: jax.Array, whole: jax.Array) -> jax.Array:
    sidecar = nnx.merge(graph, params)
    return sidecar.logits(features, whole) / sidecar.temperature[...]


def _optimizer(options: SidecarOptions) -> optax.GradientTransformation:
    # As PyTorch's Adam has it: the decay goes through the moments, too.
    return optax.chain(optax.add_decayed_weights(options.weight_decay), optax.adam(options.learning_rate))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _epoch(graph: Any, options: SidecarOptions, buffers: Any, params: Any, state: Any, data: Any, held: Any,
           order: jax.Array, counted: jax.Array, key: jax.Array) -> Any:
    """Parameters and optimizer's state after one pass over `order` `[steps, rows]`, and the logits of `held`.

    What of `order` is not `counted` fills up the last batch.
    """
    def loss(params: Any, batch: Any, counted: jax.Array, key: jax.Array) -> jax.Array:
        features, whole, known, weight = batch
        logits = nnx.merge(graph, params, buffers).logits(features, whole, (key, options.dropout))
        # PyTorch's pos_weight: the mean is over questions, not over their weights.
        each = weight * optax.sigmoid_binary_cross_entropy(logits, known)
        return jnp.sum(each * counted) / jnp.sum(counted)

    def step(carry: Any, given: Any) -> Any:
        (params, state), (chosen, counted, key) = carry, given
        gradient = jax.grad(loss)(params, tuple(part[chosen] for part in data), counted, key)
        updates, state = _optimizer(options).update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None
    keys = jax.random.split(key, len(order))
    (params, state), _ = jax.lax.scan(step, (params, state), (order, counted, keys))
    return params, state, nnx.merge(graph, params, buffers).logits(*held)
