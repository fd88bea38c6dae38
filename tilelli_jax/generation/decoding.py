"""Decoding: continues text and token ids by sampling from a network, with caches in one jitted loop."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.errors import InputError
from tilelli_jax.models import freeze
from tilelli_jax.models.causal_lm import CausalLM
from tilelli_jax.models.sampling import Sampling, sample

BYTES = 256
# Lengths are padded to multiples of it, to limit the number of compilations.
BUCKET = 64
FIRST_ROOM = 1024  # new tokens for which caches have room at first; a step's time grows with their room


class Continuation(NamedTuple):
    """The continuation of a prompt."""

    data: bytes  # the new bytes, without the stop string
    stopped: bool  # whether a stop string ended the continuation
    context_truncated: bool  # whether some bytes were predicted from the last max_seq_len bytes only

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", errors="replace")


def generate(model: CausalLM, prompts: str | bytes | Sequence[str | bytes], *, max_new: int = 200,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop: str | bytes | Sequence[str | bytes] = (), batch_size: int = 64) -> list[Continuation]:
    """Continues each prompt by up to `max_new` bytes.

    Prompts of different lengths share a batch. The result does not depend on the batch: prompt i uses a
    separate random stream, fold_in(seed, i).

    With learned positions, bytes beyond max_seq_len are predicted from the last max_seq_len bytes; the
    window slides and is recomputed for each byte, which is slow. Without positions, the cache grows and
    decoding continues beyond the trained length. Both cases issue a warning.

    Args:
        temperature, top_k, top_p: see `Sampling`.
        stop: strings that end a continuation when they occur in it.
        batch_size: maximum number of prompts in a batch.

    Raises:
        InputError: an argument is out of range, or a prompt is empty or neither text nor bytes.
    """
    if not isinstance(model, CausalLM):
        raise InputError(f"model: expected a causal network, found {type(model).__name__}")
    texts = [np.frombuffer(text, np.uint8) for text in _texts("prompts", prompts)]
    stops = [text for text in _texts("stop", stop) if text]
    sampling = Sampling(temperature, top_k, top_p, max_new, seed)
    _check_batch_size(batch_size)
    _check(model, texts)
    _warn(model, texts, max_new)
    window = _window(model)
    results: dict[int, Continuation] = {}
    for rows, chunks in _batches(freeze(model), texts, sampling, batch_size, BYTES,
                                 BUCKET if stops else max_new):
        for i, (data, stopped) in zip(rows, _until(stops, chunks, len(rows)), strict=True):
            results[i] = Continuation(data, stopped, _slides(len(texts[i]), len(data), window))
    return [results[i] for i in range(len(texts))]


class ContinuedIds(NamedTuple):
    """The continuation of a prompt of token ids."""

    ids: np.ndarray  # int32 [n], without the end token
    ended: bool  # whether an end token or `stop` ended the continuation


Stop = Callable[[np.ndarray], int | None]


def generate_ids(model: CausalLM, prompts: Sequence[Sequence[int] | np.ndarray], *, max_new: int = 200,
                 temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
                 end_ids: Sequence[int] | None = None, stop: Stop | None = None, batch_size: int = 64,
                 advance: Callable[[int], object] = lambda n: None) -> list[ContinuedIds]:
    """Continues each prompt by up to `max_new` token ids; otherwise as `generate`.

    Args:
        prompts: token ids, at least one per prompt; prompts may have different lengths.
        end_ids: ids that end a continuation; by default those of the configuration.
        stop: called with all new ids of a prompt after every BUCKET of them; returns how many of them to keep
            if the continuation ends there, else None.
        advance: called with the number of prompts of each finished batch.

    Raises:
        InputError: an argument is out of range, or an id is outside the vocabulary.
    """
    _check_batch_size(batch_size)
    ids, ends = checked_ids("prompts", model, prompts), _ends(model, end_ids)
    vocab_size, sampling = model.config.vocab_size, Sampling(temperature, top_k, top_p, max_new, seed)
    _warn(model, ids, max_new)
    results: list[ContinuedIds | None] = [None] * len(ids)
    for rows, chunks in _batches(freeze(model), ids, sampling, batch_size, vocab_size,
                                 BUCKET if len(ends) or stop else max_new):
        for i, continued in zip(rows, _until_end(ends, chunks, len(rows), stop), strict=True):
            results[i] = continued
        advance(len(rows))
    return [continued for continued in results if continued is not None]


def stream_ids(model: CausalLM, prompt: Sequence[int] | np.ndarray, *, max_new: int,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
               end_ids: Sequence[int] | None = None, chunk: int = 1) -> Iterator[ContinuedIds]:
    """Yields the new ids of one prompt as they are decoded, at most `chunk` at a time; see `generate_ids`.

    Concatenated they equal the result of `generate_ids`, for every chunk size. Only the last may have
    `ended` set; it may be empty.
    """
    if chunk < 1:
        raise InputError(f"chunk: expected at least 1, found {chunk}")
    ids, ends = checked_ids("prompt", model, [prompt]), _ends(model, end_ids)
    sampling = Sampling(temperature, top_k, top_p, max_new, seed)
    _warn(model, ids, max_new)
    chunks = _chunks(freeze(model), ids, range(1), sampling, chunk, model.config.vocab_size)
    return _stream_until_end(ends, chunks)


class Chunk(NamedTuple):
    """Some new tokens of each row."""

    new: np.ndarray  # [rows, n], int32; uint8 from `stream`
    context_truncated: list[bool]  # for each row


def stream(model: CausalLM, ids: Sequence[np.ndarray], *, max_new: int, temperature: float = 1.0,
           top_k: int = 0, top_p: float = 1.0, seed: int = 0, chunk: int = 1) -> Iterator[Chunk]:
    """Yields the new bytes as they are decoded, at most `chunk` at a time; see `generate`.

    The bytes do not depend on the chunk size.

    Args:
        ids: prompts, uint8, not empty; all form one batch.
    """
    sampling = Sampling(temperature, top_k, top_p, max_new, seed)
    if chunk < 1:
        raise InputError(f"chunk: expected at least 1, found {chunk}")
    _check(model, ids)
    _warn(model, ids, max_new)
    chunks = _chunks(freeze(model), ids, range(len(ids)), sampling, chunk, BYTES)
    return (tokens._replace(new=tokens.new.astype(np.uint8)) for tokens in chunks)


# ---------------------------------------------------------------------------------------------


def _texts(name: str, value: str | bytes | Sequence[str | bytes]) -> list[bytes]:
    """One text or several, as bytes."""
    texts = [value] if isinstance(value, str | bytes) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str | bytes) for text in texts):
        raise InputError(f"{name}: expected text, bytes or a list of them, found {value!r:.60}")
    try:
        return [text.encode() if isinstance(text, str) else text for text in texts]
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: not text: {error}") from None


def checked_ids(name: str, model: CausalLM, prompts: Sequence[Sequence[int] | np.ndarray]
                ) -> list[np.ndarray]:
    """Prompts as arrays of checked ids; `name` is the argument's name in error messages."""
    if not isinstance(model, CausalLM):
        raise InputError(f"model: expected a causal network, found {type(model).__name__}")
    ids = [np.asarray(prompt) for prompt in prompts]
    for i, row in enumerate(ids):
        where = f"{name}: {i}" if name == "prompts" else name
        if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
            raise InputError(f"{where}: expected token ids, at least one, found {row!r:.60}")
        if row.min() < 0 or row.max() >= model.config.vocab_size:
            raise InputError(f"{where}: expected ids from 0 to {model.config.vocab_size - 1}, found "
                             f"{row.min() if row.min() < 0 else row.max()}")
    return ids


def _ends(model: CausalLM, end_ids: Sequence[int] | None) -> Sequence[int]:
    return getattr(model.config, "end_ids", ()) if end_ids is None else end_ids


def _batches(model: CausalLM, ids: Sequence[np.ndarray], sampling: Sampling, batch_size: int, tokens: int,
             chunk: int) -> Iterator[tuple[list[int], Iterator[Chunk]]]:
    """Batches of prompts of similar lengths: their indices and their chunks."""
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in range(0, len(ids), batch_size):
        rows = by_length[first:first + batch_size]
        yield rows, _chunks(model, [ids[i] for i in rows], rows, sampling, chunk, tokens)


def _window(model: CausalLM) -> int | None:
    """The context length of a network with learned positions; None for all others, which have no limit."""
    return model.config.max_seq_len if model.config.positions == "learned" else None


def _slides(length: int, n_new: int, window: int | None) -> bool:
    """Whether the context of the last of `n_new` tokens after `length` others exceeds the window."""
    return window is not None and n_new > 0 and length + n_new - 1 > window


def _check(model: CausalLM, ids: Sequence[np.ndarray]) -> None:
    if not model.is_byte_level:
        raise InputError(f"model: expected a byte-level network, found family {model.config.family}, "
                         "which reads token ids; use tilelli_jax.generate_ids")
    for i, row in enumerate(ids):
        if len(row) == 0:
            prompt = f"prompt {i}" if len(ids) > 1 else "the prompt"
            raise InputError(f"{prompt} is empty; expected at least one byte")
    if model.config.vocab_size < BYTES:
        raise InputError(f"vocab_size: expected at least {BYTES} to continue bytes, "
                         f"found {model.config.vocab_size}")


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected an integer ≥ 1, found {batch_size!r}")


def _warn(model: CausalLM, ids: Sequence[np.ndarray], max_new: int) -> None:
    """Warns the user's code, two frames up, if decoding exceeds the trained length."""
    trained = model.config.max_seq_len
    longest = max(map(len, ids), default=0)
    if _slides(longest, max_new, trained):
        effect = (f"past {trained} each sees the last {trained} only" if _window(model)
                  else f"past the trained length of {trained}")
        warnings.warn(f"decoding to {longest + max_new} tokens: {effect}", stacklevel=3)


def _until(stops: Sequence[bytes], chunks: Iterator[Chunk], n_rows: int) -> list[tuple[bytes, bool]]:
    """Each row's bytes up to its first stop string, and whether there was one."""
    results = [(b"", False)] * n_rows
    for chunk in chunks:
        for i, new in enumerate(chunk.new):
            data, stopped = results[i]
            if not stopped:
                data += new.astype(np.uint8).tobytes()
                positions = [position for position in map(data.find, stops) if position >= 0]
                results[i] = (data[:min(positions)], True) if positions else (data, False)
        if all(stopped for _, stopped in results):
            break
    return results


def _until_end(ends: Sequence[int], chunks: Iterator[Chunk], n_rows: int,
               stop: Stop | None = None) -> list[ContinuedIds]:
    """Each row's ids up to its first end token, or where `stop` ends them, and whether there was an end."""
    results = [ContinuedIds(np.zeros(0, np.int32), False)] * n_rows
    for chunk in chunks:
        for i, new in enumerate(chunk.new):
            ids, ended = results[i]
            if not ended:
                positions = np.flatnonzero(np.isin(new, ends))
                ended = len(positions) > 0
                ids = np.concatenate([ids, new[:positions[0]] if ended else new])
                n_kept = None if stop is None else stop(ids)
                results[i] = ContinuedIds(ids[:n_kept], ended or n_kept is not None)
        if all(result.ended for result in results):
            break
    return results


def _stream_until_end(ends: Sequence[int], chunks: Iterator[Chunk]) -> Iterator[ContinuedIds]:
    """One row's ids, chunk by chunk, up to the first end token."""
    for chunk in chunks:
        continued, = _until_end(ends, iter([chunk]), 1)
        yield continued
        if continued.ended:
            return


def _chunks(model: CausalLM, ids: Sequence[np.ndarray], streams: Sequence[int], sampling: Sampling,
            chunk: int, tokens: int) -> Iterator[Chunk]:
    """As `stream`, for a frozen model; row j uses the random stream fold_in(seed, streams[j]).

    Args:
        tokens: only the first `tokens` tokens of the vocabulary may be sampled.
    """
    max_new, window = sampling.max_new, _window(model)
    texts = [np.asarray(row, np.int32) for row in ids]
    longest = max(map(len, texts))
    graph, params = nnx.split(model)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(np.array(streams))
    # Traced values: a change of temperature needs no new compilation.
    arguments = (np.float32(sampling.temperature), np.int32(min(sampling.top_k, tokens)),
                 np.float32(sampling.top_p))
    width = bucket(chunk)
    n_done = 0

    def chunk_of(new: jax.Array, n: int) -> Chunk:
        context_truncated = [_slides(len(row), n, window) for row in texts]
        new_ids = np.asarray(new)[:, :n]
        texts[:] = [np.concatenate([row, new_row]) for row, new_row in zip(texts, new_ids, strict=True)]
        return Chunk(new_ids, context_truncated)

    # Decode with caches while every row fits into the window.
    n_cached = max_new if window is None else min(max_new, window - longest)
    if n_cached > 0:
        lengths = np.array([len(row) for row in texts], np.int32)
        padded = pad(texts, bucket(longest, window))
        size = bucket(longest + min(n_cached, FIRST_ROOM), window)
        logits, caches = prefill(graph, params, padded, lengths, size=size)
        while n_done < n_cached:
            n = min(chunk, n_cached - n_done)
            if longest + n_done + n > size:
                size = bucket(min(max(2 * size, longest + n_done + n), longest + n_cached), window)
                caches = _grown(graph, params, padded, lengths, caches, size)
            new, logits, caches = _decode(graph, params, logits, caches, lengths + np.int32(n_done), keys,
                                          np.int32(n_done), np.int32(n), arguments, width=width,
                                          tokens=tokens)
            yield chunk_of(new, n)
            n_done += n
    # After that, recompute the window for every token.
    while n_done < max_new:
        assert window is not None
        n = min(chunk, max_new - n_done)
        context = [row[-window:] for row in texts]
        used = np.array([len(row) for row in context], np.int32)
        new = _slide(graph, params, pad(context, window), used, keys, np.int32(n_done), np.int32(n),
                     arguments, width=width, tokens=tokens)
        yield chunk_of(new, n)
        n_done += n


def _sample(keys: jax.Array, n_done: jax.Array, logits: jax.Array, arguments: tuple[jax.Array, ...],
            tokens: int) -> jax.Array:
    """The next token of each row; `n_done` is the number of new tokens so far."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, n_done))(keys)
    return jax.vmap(lambda key, row: sample(key, row[:tokens], *arguments))(keys, logits)


@functools.partial(jax.jit, static_argnames=("graph", "size"))
def prefill(graph: Any, params: Any, ids: jax.Array, lengths: jax.Array, *, size: int,
            prefix: Any = None) -> tuple[jax.Array, Any]:
    """See `CausalLM.prefill`."""
    return nnx.merge(graph, params).prefill(ids, lengths, size, prefix)


def _grown(graph: Any, params: Any, ids: np.ndarray, lengths: np.ndarray, caches: Any, size: int) -> Any:
    """The caches with room for `size` positions. Until a window is full, position p is in slot p."""
    _, shapes = jax.eval_shape(functools.partial(prefill, graph, size=size), params, ids, lengths)
    return jax.tree.map(lambda cache, shape: jnp.pad(cache, [
        (0, n - have) for n, have in zip(shape.shape, cache.shape, strict=True)]), caches, shapes)


@functools.partial(jax.jit, static_argnames=("graph", "width", "tokens"), donate_argnames=("caches",))
def _decode(graph: Any, params: Any, logits: jax.Array, caches: Any, position: jax.Array,
            keys: jax.Array, n_done: jax.Array, n: jax.Array, arguments: tuple[jax.Array, ...], *,
            width: int, tokens: int) -> tuple[jax.Array, jax.Array, Any]:
    """n ≤ width new tokens at the start of each row of `[rows, width]`, and logits and caches after them."""
    model = nnx.merge(graph, params)
    # The caches of a single row go through the loop without their row axis. XLA:CPU drops an axis of
    # length 1 before a product; if the loop kept it, each update would be computed in both forms, one of
    # them on a copy of the whole cache.
    packed, unpacked = (((lambda cache: cache[0]), (lambda cache: cache[None])) if len(position) == 1
                        else ((lambda cache: cache), (lambda cache: cache)))

    def decode_token(i: jax.Array, carry: Any) -> Any:
        new, logits, caches = carry
        ids = _sample(keys, n_done + i, logits, arguments, tokens)
        new = jax.lax.dynamic_update_index_in_dim(new, ids, i, axis=1)
        logits, caches = model.step(ids, jax.tree.map(unpacked, caches), position + i)
        return new, logits, jax.tree.map(packed, caches)

    new = jnp.zeros((len(position), width), jnp.int32)
    new, logits, caches = jax.lax.fori_loop(0, n, decode_token, (new, logits, jax.tree.map(packed, caches)))
    return new, logits, jax.tree.map(unpacked, caches)


@functools.partial(jax.jit, static_argnames=("graph", "width", "tokens"))
def _slide(graph: Any, params: Any, context: jax.Array, used: jax.Array, keys: jax.Array, n_done: jax.Array,
           n: jax.Array, arguments: tuple[jax.Array, ...], *, width: int, tokens: int) -> jax.Array:
    """As `_decode` without caches: `context [rows, window]` holds the last `used [rows]` tokens."""
    model = nnx.merge(graph, params)
    window = context.shape[1]

    def decode_token(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        new, context, used = carry
        logits = model(context)
        last = jnp.take_along_axis(logits, (used - 1)[:, None, None], axis=1)[:, 0]
        ids = _sample(keys, n_done + i, last, arguments, tokens)
        new = jax.lax.dynamic_update_index_in_dim(new, ids, i, axis=1)
        full = used == window
        context = jnp.where(full[:, None], jnp.roll(context, -1, axis=1), context)
        slots = jnp.where(full, window - 1, used)
        context = jax.vmap(lambda row, slot, token: row.at[slot].set(token))(context, slots, ids)
        return new, context, jnp.minimum(used + 1, window)

    new = jnp.zeros((len(used), width), jnp.int32)
    return jax.lax.fori_loop(0, n, decode_token, (new, context, used))[0]


def bucket(length: int, limit: int | None = None) -> int:
    """`length` rounded up to a multiple of BUCKET; beyond 512, to one of four sizes in each doubling."""
    step = max(BUCKET, (1 << (length - 1).bit_length()) // 8)
    rounded = -(-length // step) * step
    return rounded if limit is None else min(rounded, limit)


def pad(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = row
    return padded
