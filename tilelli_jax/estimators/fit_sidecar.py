"""Trains Recall's sidecar: a small model that predicts from features whether a network knows the answer."""

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

from tilelli_jax.cli import interrupts
from tilelli_jax.config import Section, setting
from tilelli_jax.estimators.sidecar import Sidecar, SidecarConfig

MIN_SPREAD = 1e-6  # added to a feature's standard deviation


@dataclasses.dataclass(frozen=True)
class SidecarOptions(Section):
    """How a sidecar is trained; the defaults are the published ones except for `balance`."""

    d_hidden: int = setting(96, "width of the GRU's state and of the head", min=1)
    epochs: int = setting(120, "maximum number of training epochs", min=1)
    patience: int = setting(20, "epochs without a better validation score after which training stops", min=1)
    learning_rate: float = setting(1e-3, "learning rate of Adam", above=0)
    weight_decay: float = setting(
        1e-4, "L2 penalty added to the gradient before Adam's moments, as in torch.optim.Adam", min=0)
    dropout: float = setting(0.1, "dropout rate of the head", min=0, below=1)
    batch_size: int = setting(128, "questions per update", min=1)
    balance: Literal["none", "weights"] = setting(
        "none", "class weights: none, or weights, which gives known and unknown questions equal total "
        "weight, as in Recall, and shifts the logits")


class Examples(NamedTuple):
    """Inputs and labels of n questions.

    Attributes:
        features: `[n, layers, n_features]`.
        prompt_features: `[n, n_prompt_features]`.
        known: `[n]`, 1 if the network knows the answer, otherwise 0.
    """

    features: np.ndarray
    prompt_features: np.ndarray
    known: np.ndarray


class FittedSidecar(NamedTuple):
    """The sidecar of the best epoch, that epoch (counted from 1), and the validation score of every epoch."""

    sidecar: Sidecar
    best_epoch: int
    scores: list[float]


def fit_sidecar(train: Examples, validate: Examples, score: Callable[[np.ndarray, np.ndarray], float],
                options: SidecarOptions = SidecarOptions(), *, names: Sequence[str] = (),
                prompt_feature_names: Sequence[str] = (), seed: int = 0) -> FittedSidecar:
    """Trains with Adam on the binary cross-entropy, and returns the epoch with the highest validation score.

    The scalers are fitted to the training questions. The same seed gives the same sidecar on one machine.

    Args:
        score: (`known` `[questions]`, logits `[questions]`) → score; higher is better.
        names, prompt_feature_names: names of the features by layer and of the prompt, stored with
            the sidecar.

    Raises:
        ValueError: a split has one class only, or a feature or a trained logit is not finite.
    """
    for name, part in (("train", train), ("validate", validate)):
        if len(np.unique(part.known)) < 2:
            raise ValueError(f"{name}: expected known and unknown questions, found one kind only")
        if not (np.isfinite(part.features).all() and np.isfinite(part.prompt_features).all()):
            raise ValueError(f"{name}: a feature is not finite")
    config = SidecarConfig(n_features=train.features.shape[-1],
                           n_prompt_features=train.prompt_features.shape[-1],
                           d_hidden=options.d_hidden, features=tuple(names),
                           prompt_features=tuple(prompt_feature_names))
    sidecar = Sidecar(config, rngs=nnx.Rngs(seed))
    fit_scalers(sidecar, train)
    graph, params, buffers = nnx.split(sidecar, nnx.Param, ...)  # type: ignore[misc]
    n, known = len(train.known), train.known.astype(np.float32)
    weights = np.ones(n, np.float32)
    if options.balance == "weights":
        weights[known == 1] = (n - known.sum()) / known.sum()
    data = jax.tree.map(jnp.asarray, (train.features, train.prompt_features, known, weights))
    validation = jax.tree.map(jnp.asarray, (validate.features, validate.prompt_features))

    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    rows = min(options.batch_size, n)
    steps = -(-n // rows)
    mask = (np.arange(steps * rows) < n).astype(np.float32).reshape(steps, rows)
    state, best, scores = _optimizer(options).init(params), params, []
    for epoch in range(options.epochs):
        interrupts.raise_if_received()
        order = np.resize(rng.permutation(n), (steps, rows))
        params, state, logits = _epoch(graph, options, buffers, params, state, data, validation, order, mask,
                                       jax.random.fold_in(key, epoch))
        if not np.isfinite(logits).all():
            raise ValueError(f"seed {seed}: after epoch {epoch + 1} the logits are not finite; a smaller "
                             "learning_rate may help")
        scores.append(score(validate.known, np.asarray(logits, np.float64)))
        if epoch == int(np.argmax(scores)):
            best = params
        elif epoch - int(np.argmax(scores)) >= options.patience:
            break
    return FittedSidecar(nnx.merge(graph, best, buffers), int(np.argmax(scores)) + 1, scores)


def fit_scalers(sidecar: Sidecar, train: Examples) -> None:
    """Fits mean and standard deviation of each feature (over questions and layers) and global feature."""
    features = train.features.reshape(-1, train.features.shape[-1]).astype(np.float64)
    sidecar.feature_scaler.mean[...] = jnp.asarray(features.mean(axis=0), jnp.float32)
    sidecar.feature_scaler.scale[...] = jnp.asarray(features.std(axis=0) + MIN_SPREAD, jnp.float32)
    prompt_features = train.prompt_features.astype(np.float64)
    spread = prompt_features.std(axis=0)
    sidecar.prompt_scaler.mean[...] = jnp.asarray(prompt_features.mean(axis=0), jnp.float32)
    sidecar.prompt_scaler.scale[...] = jnp.asarray(np.where(spread > 0, spread, 1.0), jnp.float32)


def sidecar_logits(sidecar: Sidecar, features: np.ndarray, prompt_features: np.ndarray) -> np.ndarray:
    """Returns the logits divided by the temperature, f64 `[questions]`; P(knows) is their sigmoid."""
    graph, params = nnx.split(sidecar)
    logits = _logits(graph, params, jnp.asarray(features, jnp.float32),
                     jnp.asarray(prompt_features, jnp.float32))
    return np.asarray(logits, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, params: Any, features: jax.Array, prompt_features: jax.Array) -> jax.Array:
    sidecar = nnx.merge(graph, params)
    return sidecar.logits(features, prompt_features) / sidecar.temperature[...]


def _optimizer(options: SidecarOptions) -> optax.GradientTransformation:
    # As in PyTorch's Adam, the decay goes through the moments.
    return optax.chain(optax.add_decayed_weights(options.weight_decay), optax.adam(options.learning_rate))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _epoch(graph: Any, options: SidecarOptions, buffers: Any, params: Any, state: Any, data: Any,
           validation: Any, order: jax.Array, mask: jax.Array, key: jax.Array) -> Any:
    """Returns parameters and optimiser state after one epoch over `order` `[steps, rows]`, and validation
    logits.

    `mask [steps, rows]` is 0 for the rows that only fill up the last batch.
    """
    def loss(params: Any, batch: Any, mask: jax.Array, key: jax.Array) -> jax.Array:
        features, prompt_features, known, weight = batch
        logits = nnx.merge(graph, params, buffers).logits(features, prompt_features, (key, options.dropout))
        # PyTorch's pos_weight: the mean is over questions, not over their weights.
        losses = weight * optax.sigmoid_binary_cross_entropy(logits, known)
        return jnp.sum(losses * mask) / jnp.sum(mask)

    def step(carry: Any, inputs: Any) -> Any:
        (params, state), (chosen, mask, key) = carry, inputs
        gradient = jax.grad(loss)(params, tuple(part[chosen] for part in data), mask, key)
        updates, state = _optimizer(options).update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None
    keys = jax.random.split(key, len(order))
    (params, state), _ = jax.lax.scan(step, (params, state), (order, mask, keys))
    return params, state, nnx.merge(graph, params, buffers).logits(*validation)
