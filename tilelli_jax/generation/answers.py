"""Answers of a network: one greedy answer and samples of each prompt, with statistics of every token.

The answers of a prompt share the cache of one pass of it, and many prompts form a batch. Ids with which all
prompts begin, such as a system prompt or few-shot examples, are processed once. Decoding ends when all
answers of a batch have ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.errors import InputError
from tilelli_jax.generation import decoding
from tilelli_jax.models import freeze
from tilelli_jax.models.causal_lm import CausalLM
from tilelli_jax.models.sampling import sample
from tilelli_jax.signals.batching import bucket, max_time

# A shared prefix is cut to a multiple of PREFIX_STEP ids, because each of its lengths is compiled, and
# ignored if it saves fewer than PREFIX_SAVES tokens: compiling would take longer than they do.
PREFIX_STEP, PREFIX_SAVES = 16, 2048


class Answer(NamedTuple):
    """One answer. Statistics are of the network's distribution at temperature 1, whatever it sampled from.

    Attributes:
        ids: int32 `[n]`, without the token that ended it.
        ended: whether an end token ended it; if so, the statistics have one more entry, for that token.
        log_probs: f32 `[n or n + 1]`, log-probability of each token given all before it, in nats.
        entropies: the entropy of each token's distribution, in nats.
        divergences: KL(uniform ‖ distribution) of each token's distribution, in nats.
        streams: f32 `[layers, d_model]`, the residual stream after each recorded layer at the last token of
            `ids`; zeros if it has none.
    """

    ids: np.ndarray
    ended: bool
    log_probs: np.ndarray
    entropies: np.ndarray
    divergences: np.ndarray
    streams: np.ndarray


class Answers(NamedTuple):
    """The greedy answer of a prompt, and samples.

    `next_logits`: f32 `[logit_ids]`, logits of these tokens after the prompt.
    """

    greedy: Answer
    samples: list[Answer]
    next_logits: np.ndarray


def generate_answers(model: CausalLM, prompts: Sequence[Sequence[int] | np.ndarray], *, n_samples: int = 0,
                     max_new: int = 32, temperature: float = 1.0, seed: int = 0,
                     streams: Sequence[int] | None = None, end_ids: Sequence[int] | None = None,
                     layers: Sequence[int] | None = None, sample_layers: Sequence[int] = (),
                     logit_ids: Sequence[int] = (), batch_size: int = 32,
                     advance: Callable[[int], object] = lambda n: None) -> list[Answers]:
    """Returns the greedy answer of each prompt and `n_samples` samples.

    The result does not depend on the batch, except for rounding: sample k of prompt i uses the random stream
    fold_in(fold_in(seed, streams[i]), k). In a network with learned positions an answer ends where the
    context is full.

    Args:
        prompts: token ids, at least one for each prompt.
        temperature: of the samples, above 0.
        streams: random stream of each prompt; by default its index.
        end_ids: ids that end an answer; by default those of the configuration.
        layers, sample_layers: layers whose residual stream is recorded at the last token of the greedy answer
            and of the samples; by default all of the greedy answer and none of the samples.
        logit_ids: tokens whose logits after the prompt are returned.
        batch_size: maximum number of answers that are decoded at once.
        advance: called with the number of prompts of each finished batch.

    Raises:
        InputError: an argument is out of range, or an id is outside the vocabulary.
    """
    ids = decoding.checked_ids("prompts", model, prompts)
    for name, value, least in (("n_samples", n_samples, 0), ("max_new", max_new, 1),
                               ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"{name}: expected at least {least}, found {value}")
    if not 0 < temperature < np.inf:
        raise InputError(f"temperature: expected a number above 0, found {temperature:g}")
    numbers = np.arange(len(ids)) if streams is None else np.asarray(streams, np.int64)
    ends = np.array(getattr(model.config, "end_ids", ()) if end_ids is None else end_ids, np.int32)
    recorded = tuple(range(model.config.n_layers) if layers is None else layers)
    limit = max_time(model)
    for i, row in enumerate(ids):
        if limit is not None and len(row) > limit:
            raise InputError(f"prompts: {i}: expected at most {limit} ids, found {len(row)}")
    budgets = [max_new if limit is None else max(1, min(max_new, limit - len(row) + 1)) for row in ids]
    graph, params = nnx.split(freeze(model))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    per_batch = max(1, batch_size // (1 + n_samples))
    prefix, caches_of_prefix = _shared_prefix(model, ids), None
    if prefix:
        _, caches_of_prefix = decoding.prefill(graph, params, ids[0][None, :prefix], np.array([prefix]),
                                               size=prefix)
    results: dict[int, Answers] = {}
    for start in range(0, len(order), per_batch):
        batch = order[start:start + per_batch]
        # Surplus rows repeat the last prompt, so that all batches of a length share one program.
        rows = [*batch, *batch[-1:] * (min(per_batch, _next_power(len(order))) - len(batch))]
        lengths = np.array([len(ids[i]) for i in rows], np.int32)
        longest = int(lengths.max())
        time = bucket(longest - prefix, None if limit is None else limit - prefix)
        size = max(decoding.bucket(longest + max_new, limit), prefix + time)
        logits, caches = decoding.prefill(
            graph, params, decoding.pad([ids[i][prefix:] for i in rows], time), lengths - np.int32(prefix),
            size=size, prefix=caches_of_prefix)
        keys = _keys(seed, numbers[rows], n_samples)
        next_logits = np.asarray(logits[:, np.array(logit_ids, np.int32)])
        output = jax.device_get(_decode(
            graph, params, logits, caches, lengths, keys, ends, np.float32(temperature),
            np.array([budgets[i] for i in rows], np.int32), n_samples=n_samples,
            width=decoding.bucket(max_new), layers=recorded, sample_layers=tuple(sample_layers), limit=limit))
        for j, i in enumerate(batch):
            first = j * (1 + n_samples)
            greedy = _answer(output, first, output.streams[:, j])
            samples = [_answer(output, first + 1 + k, output.sample_streams[:, j * n_samples + k])
                       for k in range(n_samples)]
            results[i] = Answers(greedy, samples, next_logits[j])
        advance(len(batch))
    return [results[i] for i in range(len(ids))]


# ---------------------------------------------------------------------------------------------


def _shared_prefix(model: CausalLM, ids: Sequence[np.ndarray]) -> int:
    """The number of ids with which all prompts begin and that are worth a pass of their own."""
    if not ids:
        return 0
    longest = min(min(map(len, ids)) - 1, model.longest_prefix())
    same = np.all([row[:longest] == ids[0][:longest] for row in ids], axis=0)
    n = int(np.argmin(np.append(same, False))) // PREFIX_STEP * PREFIX_STEP
    return n if n * (len(ids) - 1) >= PREFIX_SAVES else 0


class _Output(NamedTuple):
    """What is decoded, by answer: those of a prompt are adjacent, the greedy one first.

    Attributes:
        ids: int32 `[answers, width]`; with the end token, if there is one.
        log_probs, entropies, divergences: f32 `[answers, width]`.
        lengths: int32 `[answers]`, without the end token.
        ended: bool `[answers]`.
        streams, sample_streams: f32 `[layers, prompts, d_model]` and `[layers, samples, d_model]`.
    """

    ids: Any
    log_probs: Any
    entropies: Any
    divergences: Any
    lengths: Any
    ended: Any
    streams: Any
    sample_streams: Any


def _answer(output: _Output, row: int, streams: np.ndarray) -> Answer:
    n, ended = int(output.lengths[row]), bool(output.ended[row])
    log_probs, entropies, divergences = (values[row, :n + ended] for values in (
        output.log_probs, output.entropies, output.divergences))
    return Answer(output.ids[row, :n], ended, log_probs, entropies, divergences, streams)


def _keys(seed: int, streams: np.ndarray, n_samples: int) -> jax.Array:
    """Keys of the samples, `[prompts, n_samples]`."""
    of_prompt = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        streams.astype(np.uint32))
    return jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(
        jnp.arange(n_samples, dtype=jnp.uint32)))(of_prompt)


@functools.partial(jax.jit, static_argnames=(
    "graph", "n_samples", "width", "layers", "sample_layers", "limit"))
def _decode(graph: Any, params: Any, logits: jax.Array, caches: Any, lengths: jax.Array, keys: jax.Array,
            ends: jax.Array, temperature: jax.Array, budgets: jax.Array, *, n_samples: int, width: int,
            layers: tuple[int, ...], sample_layers: tuple[int, ...], limit: int | None) -> _Output:
    """Decodes 1 + n_samples answers of each prompt, up to `budgets [prompts]` ≤ width tokens."""
    model = nnx.merge(graph, params)
    n_prompts, per_prompt = len(lengths), 1 + n_samples

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, per_prompt, axis=0)

    def of_greedy(x: jax.Array) -> jax.Array:  # [answers, …] → [prompts, …]
        return x.reshape(n_prompts, per_prompt, *x.shape[1:])[:, 0]

    def of_samples(x: jax.Array) -> jax.Array:
        return x.reshape(n_prompts, per_prompt, *x.shape[1:])[:, 1:].reshape(-1, *x.shape[1:])

    def choose(i: jax.Array, logits: jax.Array) -> jax.Array:
        ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if not n_samples:
            return ids
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys.reshape(-1))
        sampled = jax.vmap(lambda key, row: sample(key, row, temperature, jnp.int32(0), jnp.float32(1)))(
            step_keys, of_samples(logits))
        return jnp.concatenate([of_greedy(ids)[:, None], sampled.reshape(n_prompts, -1)], axis=1).reshape(-1)

    start, allowed = repeated(lengths), repeated(budgets)
    n, d = len(start), model.config.d_model
    zeros = jnp.zeros((n, width), jnp.float32)
    empty = _Output(jnp.zeros((n, width), jnp.int32), zeros, zeros, zeros, jnp.zeros(n, jnp.int32),
                    jnp.zeros(n, bool), jnp.zeros((len(layers), n_prompts, d), jnp.float32),
                    jnp.zeros((len(sample_layers), n_prompts * n_samples, d), jnp.float32))

    def active(i: jax.Array, output: _Output) -> jax.Array:
        return ~output.ended & (i < allowed)

    def decode_token(carry: Any) -> Any:
        i, output, logits, caches = carry
        decoding_now = active(i, output)
        ids = choose(i, logits)
        log_probs = jax.nn.log_softmax(logits)
        statistics = (jnp.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0],
                      -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1),
                      -jnp.mean(log_probs, axis=1) - jnp.log(logits.shape[1]))
        ended = jnp.isin(ids, ends)
        position = start + i
        logits, caches, streams = model.step_with_streams(
            ids, caches, position if limit is None else jnp.minimum(position, limit - 1))
        streams = streams.astype(jnp.float32)
        kept = decoding_now & ~ended
        # Beyond the context nothing is computed: the stream stays that of the token before.
        recorded = kept if limit is None else kept & (position < limit)

        def select(mask: jax.Array, chosen: tuple[int, ...], of_rows: Callable[[jax.Array], jax.Array],
                   before: jax.Array) -> jax.Array:
            if not chosen:
                return before
            new = jax.vmap(of_rows)(streams[np.array(chosen)])
            return jnp.where(of_rows(mask)[None, :, None], new, before)
        new_ids, log_prob, entropy, divergence = (
            jax.lax.dynamic_update_index_in_dim(old, new, i, axis=1)
            for old, new in zip(output[:4], (ids, *statistics), strict=True))
        return i + 1, _Output(
            new_ids, log_prob, entropy, divergence, output.lengths + kept,
            output.ended | decoding_now & ended,
            select(recorded, layers, of_greedy, output.streams),
            select(recorded, sample_layers, of_samples, output.sample_streams)), logits, caches

    def unfinished(carry: Any) -> jax.Array:
        return jnp.any(active(carry[0], carry[1]))

    carry = jnp.int32(0), empty, repeated(logits), jax.tree.map(repeated, caches)
    return jax.lax.while_loop(unfinished, decode_token, carry)[1]


def _next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
