"""Does an answer take shape before it is given? What the logit lens says layer by layer of one prompt.

Signal A is how the last position, and the last of the question, settle on a token; signal B how definite
and how large the feed-forward writes are at the question's positions (Recall's features, of which the
published estimator reads 12 a layer and 10 of the whole). Entropies and divergences are in nats.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tilelli_jax.nn.unembed import Unembedding
from tilelli_jax.signals.lens import CHUNK, logit_lens, logit_lens_from

BY_LAYER = ("a_entropy_final", "a_margin_final", "a_maxprob_final", "a_kl_prev_final", "a_entropy_mean",
            "a_margin_mean", "a_maxprob_mean", "b_cmax_rel_norm", "b_finalpos_rel_norm", "b_cmax_peak",
            "b_finalpos_peak", "b_mean_coh")
OVERALL = ("a_final_entropy", "a_min_entropy", "a_band_mean_entropy", "a_settling_layer_norm",
           "a_mean_kl_last25", "a_max_margin", "b_band_max_peak", "b_band_mean_peak", "b_band_max_rel_norm",
           "b_layer_of_max_peak")
LAST = 4  # positions of the question whose distributions are averaged
EPS = 1e-6  # added to the length of the stream that a write is compared with
BAND = (0.35, 0.75)  # of the depth, where writes are told of


class LayerActivations(NamedTuple):
    """Activations at some positions of prompts: each `[layers, batch, positions, d_model]`.

    The last of the positions is the prompt's last; the others are the question's, filled up with any.

    `stream` after the layer; `write` of its feed-forward network; `beside`, the stream that this is added to;
    `attention`, what attention adds, or None.
    """

    stream: jax.Array
    write: jax.Array
    beside: jax.Array
    attention: jax.Array | None = None


class Crystallisation(NamedTuple):
    """What became of each prompt.

    `by_layer` f32 `[batch, layers, 12]` and `overall` f32 `[batch, 10]`, in the order of BY_LAYER and
    OVERALL. `entropies` f32 `[batch, layers, 3]` at the last position: of attention's write, of the
    feed-forward network's, of the stream (TriLens; attention's is 0 where it is not known).
    `best` int32 `[batch, layers]`: the likeliest token at the last position. `strongest_layer` and
    `strongest_token` int32 `[batch]`: the most definite write in the band, and its token.
    """

    by_layer: jax.Array
    overall: jax.Array
    entropies: jax.Array
    best: jax.Array
    strongest_layer: jax.Array
    strongest_token: jax.Array


def band(n_layers: int) -> tuple[int, int]:
    """The first and the last layer of the middle of the depth."""
    low = min(max(int(BAND[0] * n_layers), 0), n_layers - 1)
    return low, min(max(int(BAND[1] * n_layers), low), n_layers - 1)


def crystallisation(unembedding: Unembedding, inner: LayerActivations, question: jax.Array, *, chunk: int = CHUNK,
                    rounded: bool = False) -> Crystallisation:
    """Signals A and B of a batch of prompts.

    Args:
        question: bool `[batch, positions]`: which of the positions are the question's, in order. Where none
            is, the last position of the prompt stands for it.
        chunk: tokens of the vocabulary at a time; the largest array is `[rows, chunk]` f32, with
            layers · batch · (positions + 5) rows.
        rounded: the lens in bfloat16, step by step.
    """
    n_layers, batch, positions, d = inner.stream.shape
    question = question | (~question.any(axis=1, keepdims=True) & (jnp.arange(positions) == positions - 1))

    # The last position through the lens, each layer against the one before.
    final = inner.stream[:, :, -1].reshape(-1, d)
    numbers = jnp.arange(n_layers * batch)
    told, divergence = logit_lens_from(unembedding, final, jnp.where(numbers < batch, numbers, numbers - batch),
                                 chunk=chunk, rounded=rounded)
    told, divergence = jax.tree.map(lambda a: a.reshape(n_layers, batch), (told, divergence))

    # The last of the question, and all writes.
    # Counted from the end: …, −2, −1, and 0 at the last.
    place = jnp.cumsum(question, axis=1) - jnp.sum(question, axis=1, keepdims=True)
    is_last = question & (place > -LAST)
    at = jnp.argsort(~is_last, axis=1, stable=True)[:, :LAST]
    counted = jnp.take_along_axis(is_last, at, axis=1)
    last = jnp.take_along_axis(inner.stream, at[None, :, :, None], axis=2)
    rows = [last, inner.write] + ([] if inner.attention is None else [inner.attention[:, :, -1:]])
    widths = [part.shape[2] for part in rows]
    flat = jnp.concatenate(rows, axis=2).reshape(-1, d)
    shape = (n_layers, batch, sum(widths))
    others = jax.tree.map(lambda a: a.reshape(shape), logit_lens(unembedding, flat, chunk=chunk, rounded=rounded))
    of_last = jax.tree.map(lambda a: a[:, :, :widths[0]], others)
    of_write = jax.tree.map(lambda a: a[:, :, widths[0]:widths[0] + positions], others)

    def averaged(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counted, values, 0), axis=2) / jnp.sum(counted, axis=1)

    def largest(values: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(question, values, -jnp.inf), axis=2)

    write, beside = inner.write.astype(jnp.float32), inner.beside.astype(jnp.float32)
    size = jnp.linalg.norm(write, axis=-1) / (jnp.linalg.norm(beside, axis=-1) + EPS)
    peak = jnp.log(jnp.float32(unembedding.vocab_size)) - of_write.entropy
    along = jnp.mean(_cosine(write[1:], write[:-1]), axis=-1, where=question)
    coherence = jnp.concatenate([jnp.zeros((1, batch)), along])
    columns = (told.entropy, told.margin, told.top, divergence, averaged(of_last.entropy),
               averaged(of_last.margin), averaged(of_last.top), largest(size), size[:, :, -1], largest(peak),
               peak[:, :, -1], coherence)
    by_layer = jnp.nan_to_num(jnp.stack(columns, axis=-1), nan=0.0, posinf=0.0, neginf=0.0)
    by_layer = jnp.swapaxes(by_layer, 0, 1)

    best = told.best.T
    low, high = band(n_layers)
    strongest = low + jnp.argmax(by_layer[:, low:high + 1, 9], axis=1)
    row = jnp.arange(batch)
    where = jnp.argmax(jnp.where(question, peak, -jnp.inf)[strongest, row], axis=1)
    attention = (jnp.zeros((n_layers, batch)) if inner.attention is None else others.entropy[:, :, -1])
    entropies = jnp.stack([attention, of_write.entropy[:, :, -1], told.entropy], axis=-1)
    return Crystallisation(by_layer, overall(by_layer, best, strongest), jnp.swapaxes(entropies, 0, 1), best,
                           strongest.astype(jnp.int32), of_write.best[strongest, row, where])


def overall(by_layer: jax.Array, best: jax.Array, strongest: jax.Array) -> jax.Array:
    """OVERALL of `by_layer` f32 `[batch, layers, 12]`, `best` `[batch, layers]`, `strongest` `[batch]`."""
    n_layers = by_layer.shape[1]
    low, high = band(n_layers)
    middle, deepest = slice(low, high + 1), max(n_layers - 1, 1)
    changes = jnp.where(best[:, 1:] != best[:, :-1], jnp.arange(1, n_layers), 0)
    settled = jnp.max(changes, axis=1, initial=0)
    late = by_layer[:, int(0.75 * n_layers):, 3]
    return jnp.stack([
        by_layer[:, -1, 0], jnp.min(by_layer[:, :, 0], axis=1), jnp.mean(by_layer[:, middle, 0], axis=1),
        settled / deepest, jnp.mean(late, axis=1), jnp.max(by_layer[:, :, 1], axis=1),
        jnp.max(by_layer[:, middle, 9], axis=1), jnp.mean(by_layer[:, middle, 9], axis=1),
        jnp.max(by_layer[:, middle, 7], axis=1), strongest / deepest], axis=1).astype(jnp.float32)


def _cosine(a: jax.Array, b: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Of the last axis, each length at least eps, as PyTorch has it."""
    lengths = [jnp.maximum(jnp.linalg.norm(x, axis=-1), eps) for x in (a, b)]
    return jnp.sum(a * b, axis=-1) / (lengths[0] * lengths[1])
