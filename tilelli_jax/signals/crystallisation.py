"""Crystallisation and MLP-write specificity (signals A and B of Recall): logit-lens features of a prompt.

Crystallisation measures how the prediction at the last position, and at the last positions of the
question, settles on a token over the layers. MLP-write specificity measures the entropy and the norm of
the MLP writes at the question's positions. These are Recall's features: the published estimator uses 12
per layer and 10 of the whole prompt. Entropies and divergences are in nats.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tilelli_jax.nn.unembed import Unembedding
from tilelli_jax.signals.lens import CHUNK, logit_lens, logit_lens_from

LAST = 4  # number of last question positions whose distributions are averaged
EPS = 1e-6  # added to the norm of the residual stream that a write is divided by
BAND = (0.35, 0.75)  # middle band of the layers, as fractions of the depth


class LayerFeatures(NamedTuple):
    """Features of each layer, each f32 `[…, layers]`, under the names of the published estimator.

    `a_` features are of crystallisation, at the prompt's last position (`_final`) or averaged over the last
    positions of the question (`_mean`). `b_` features are of the MLP writes at the question's positions.

    Attributes:
        a_entropy_final, a_entropy_mean: entropy of the logit lens, in nats.
        a_margin_final, a_margin_mean: largest minus second largest logit.
        a_maxprob_final, a_maxprob_mean: largest probability.
        a_kl_prev_final: KL divergence from the previous layer's logit lens, in nats; 0 in the first layer.
        b_cmax_rel_norm: norm of the write over the norm of the stream to which it is added, maximum.
        b_finalpos_rel_norm: the same at the last position of the prompt.
        b_cmax_peak: log of the vocabulary's size minus the entropy of the write's logit lens, in nats,
            maximum.
        b_finalpos_peak: the same at the last position of the prompt.
        b_mean_coh: cosine similarity with the previous layer's write, mean; 0 in the first layer.
    """

    a_entropy_final: jax.Array
    a_margin_final: jax.Array
    a_maxprob_final: jax.Array
    a_kl_prev_final: jax.Array
    a_entropy_mean: jax.Array
    a_margin_mean: jax.Array
    a_maxprob_mean: jax.Array
    b_cmax_rel_norm: jax.Array
    b_finalpos_rel_norm: jax.Array
    b_cmax_peak: jax.Array
    b_finalpos_peak: jax.Array
    b_mean_coh: jax.Array


class PromptFeatures(NamedTuple):
    """Features of a whole prompt, each f32 `[…]`; the band is the middle band of the layers.

    Attributes:
        a_final_entropy: a_entropy_final of the last layer.
        a_min_entropy: a_entropy_final, minimum over the layers.
        a_band_mean_entropy: a_entropy_final, mean over the band.
        a_settling_layer_norm: last layer whose most likely token differs from the previous layer's, over the
            number of the last layer; 0 if there is none.
        a_mean_kl_last25: a_kl_prev_final, mean over the last quarter of the layers.
        a_max_margin: a_margin_final, maximum over the layers.
        b_band_max_peak, b_band_mean_peak: b_cmax_peak, maximum and mean over the band.
        b_band_max_rel_norm: b_cmax_rel_norm, maximum over the band.
        b_layer_of_max_peak: layer of the largest b_cmax_peak in the band, over the number of the last layer.
    """

    a_final_entropy: jax.Array
    a_min_entropy: jax.Array
    a_band_mean_entropy: jax.Array
    a_settling_layer_norm: jax.Array
    a_mean_kl_last25: jax.Array
    a_max_margin: jax.Array
    b_band_max_peak: jax.Array
    b_band_mean_peak: jax.Array
    b_band_max_rel_norm: jax.Array
    b_layer_of_max_peak: jax.Array


BY_LAYER = LayerFeatures._fields
PROMPT_FEATURES = PromptFeatures._fields


class LayerActivations(NamedTuple):
    """Activations at some positions of prompts: each `[layers, batch, positions, d_model]`.

    The last position is the last of the prompt; the others are those of the question, padded with
    arbitrary positions.

    Attributes:
        stream: the residual stream after the layer.
        write: the MLP write.
        base: the residual stream to which the write is added.
        attention: the output of attention, or None.
    """

    stream: jax.Array
    write: jax.Array
    base: jax.Array
    attention: jax.Array | None = None


class Crystallisation(NamedTuple):
    """Features of each prompt.

    Attributes:
        by_layer: f32 `[batch, layers, 12]`, in the order of BY_LAYER.
        prompt_features: f32 `[batch, 10]`, in the order of PROMPT_FEATURES.
        entropies: f32 `[batch, layers, 3]`, logit-lens entropies at the last position (TriLens): of the
            output of attention (0 if not recorded), of the MLP write, of the residual stream.
        best: int32 `[batch, layers]`, the most likely token at the last position.
        strongest_layer: int32 `[batch]`, the layer of the write with the lowest entropy in the band.
        strongest_token: int32 `[batch]`, the most likely token of that write.
    """

    by_layer: jax.Array
    prompt_features: jax.Array
    entropies: jax.Array
    best: jax.Array
    strongest_layer: jax.Array
    strongest_token: jax.Array


def band(n_layers: int) -> tuple[int, int]:
    """The first and the last layer of the middle band (see BAND)."""
    low = min(max(int(BAND[0] * n_layers), 0), n_layers - 1)
    return low, min(max(int(BAND[1] * n_layers), low), n_layers - 1)


def crystallisation(unembedding: Unembedding, activations: LayerActivations, question: jax.Array, *,
                    chunk: int = CHUNK, rounded: bool = False) -> Crystallisation:
    """Crystallisation and MLP-write specificity of a batch of prompts.

    Args:
        question: bool `[batch, positions]`, True at the question's positions, in order. If a row has none,
            the last position of the prompt is used.
        chunk: number of tokens per slice of the vocabulary; the largest array is `[rows, chunk]` f32, with
            layers · batch · (positions + 5) rows.
        rounded: round every step of the logit lens to bfloat16.
    """
    n_layers, batch, positions, d = activations.stream.shape
    question = question | (~question.any(axis=1, keepdims=True) & (jnp.arange(positions) == positions - 1))

    # Logit lens of the last position; each layer is compared with the previous one.
    final = activations.stream[:, :, -1].reshape(-1, d)
    rows = jnp.arange(n_layers * batch)
    final_stats, divergence = logit_lens_from(unembedding, final, jnp.where(rows < batch, rows, rows - batch),
                                              chunk=chunk, rounded=rounded)
    final_stats, divergence = jax.tree.map(lambda a: a.reshape(n_layers, batch), (final_stats, divergence))

    # Logit lens of the last positions of the question, and of all writes.
    # Index of each question position counted from the end: …, −2, −1, and 0 at the last.
    from_end = jnp.cumsum(question, axis=1) - jnp.sum(question, axis=1, keepdims=True)
    is_last = question & (from_end > -LAST)
    last_positions = jnp.argsort(~is_last, axis=1, stable=True)[:, :LAST]
    counted = jnp.take_along_axis(is_last, last_positions, axis=1)
    last = jnp.take_along_axis(activations.stream, last_positions[None, :, :, None], axis=2)
    parts = [last, activations.write]
    if activations.attention is not None:
        parts.append(activations.attention[:, :, -1:])
    widths = [part.shape[2] for part in parts]
    flat = jnp.concatenate(parts, axis=2).reshape(-1, d)
    shape = (n_layers, batch, sum(widths))
    stats = jax.tree.map(lambda a: a.reshape(shape),
                         logit_lens(unembedding, flat, chunk=chunk, rounded=rounded))
    last_stats = jax.tree.map(lambda a: a[:, :, :widths[0]], stats)
    write_stats = jax.tree.map(lambda a: a[:, :, widths[0]:widths[0] + positions], stats)

    def averaged(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counted, values, 0), axis=2) / jnp.sum(counted, axis=1)

    def largest(values: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(question, values, -jnp.inf), axis=2)

    write, base = activations.write.astype(jnp.float32), activations.base.astype(jnp.float32)
    relative_norm = jnp.linalg.norm(write, axis=-1) / (jnp.linalg.norm(base, axis=-1) + EPS)
    peak = jnp.log(jnp.float32(unembedding.vocab_size)) - write_stats.entropy
    similarity = jnp.mean(_cosine(write[1:], write[:-1]), axis=-1, where=question)
    coherence = jnp.concatenate([jnp.zeros((1, batch)), similarity])
    features = LayerFeatures(
        a_entropy_final=final_stats.entropy, a_margin_final=final_stats.margin,
        a_maxprob_final=final_stats.top, a_kl_prev_final=divergence,
        a_entropy_mean=averaged(last_stats.entropy), a_margin_mean=averaged(last_stats.margin),
        a_maxprob_mean=averaged(last_stats.top),
        b_cmax_rel_norm=largest(relative_norm), b_finalpos_rel_norm=relative_norm[:, :, -1],
        b_cmax_peak=largest(peak), b_finalpos_peak=peak[:, :, -1], b_mean_coh=coherence)
    by_layer = jnp.nan_to_num(jnp.stack(features, axis=-1), nan=0.0, posinf=0.0, neginf=0.0)
    by_layer = jnp.swapaxes(by_layer, 0, 1)

    best = final_stats.best.T
    low, high = band(n_layers)
    strongest = low + jnp.argmax(by_layer[:, low:high + 1, BY_LAYER.index("b_cmax_peak")], axis=1)
    row = jnp.arange(batch)
    position = jnp.argmax(jnp.where(question, peak, -jnp.inf)[strongest, row], axis=1)
    attention = (jnp.zeros((n_layers, batch)) if activations.attention is None else stats.entropy[:, :, -1])
    entropies = jnp.stack([attention, write_stats.entropy[:, :, -1], final_stats.entropy], axis=-1)
    return Crystallisation(by_layer, prompt_features(by_layer, best, strongest),
                           jnp.swapaxes(entropies, 0, 1), best,
                           strongest.astype(jnp.int32), write_stats.best[strongest, row, position])


def prompt_features(by_layer: jax.Array, best: jax.Array, strongest: jax.Array) -> jax.Array:
    """The prompt features from `by_layer` f32 `[batch, layers, 12]`, `best` `[batch, layers]` and
    `strongest` `[batch]` (the layer of the strongest write)."""
    n_layers = by_layer.shape[1]
    layers = LayerFeatures(*(by_layer[:, :, i] for i in range(len(BY_LAYER))))
    low, high = band(n_layers)
    middle, deepest = slice(low, high + 1), max(n_layers - 1, 1)
    changes = jnp.where(best[:, 1:] != best[:, :-1], jnp.arange(1, n_layers), 0)
    settled = jnp.max(changes, axis=1, initial=0)
    features = PromptFeatures(
        a_final_entropy=layers.a_entropy_final[:, -1],
        a_min_entropy=jnp.min(layers.a_entropy_final, axis=1),
        a_band_mean_entropy=jnp.mean(layers.a_entropy_final[:, middle], axis=1),
        a_settling_layer_norm=settled / deepest,
        a_mean_kl_last25=jnp.mean(layers.a_kl_prev_final[:, int(0.75 * n_layers):], axis=1),
        a_max_margin=jnp.max(layers.a_margin_final, axis=1),
        b_band_max_peak=jnp.max(layers.b_cmax_peak[:, middle], axis=1),
        b_band_mean_peak=jnp.mean(layers.b_cmax_peak[:, middle], axis=1),
        b_band_max_rel_norm=jnp.max(layers.b_cmax_rel_norm[:, middle], axis=1),
        b_layer_of_max_peak=strongest / deepest)
    return jnp.stack(features, axis=1).astype(jnp.float32)


def _cosine(a: jax.Array, b: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Cosine similarity over the last axis; each norm is at least eps, as in PyTorch."""
    norms = [jnp.maximum(jnp.linalg.norm(x, axis=-1), eps) for x in (a, b)]
    return jnp.sum(a * b, axis=-1) / (norms[0] * norms[1])
