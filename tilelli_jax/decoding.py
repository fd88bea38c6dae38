"""Continuing text and token ids: sampling from a network, with caches, inside one jitted loop."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.errors import InputError
from tilelli_jax.models import freeze
from tilelli_jax.models.decoder import CausalLM
from tilelli_jax.sampling import Sampling, sample

BYTES = 256
# Compiled once for each multiple of it, not once for each length.
BUCKET = 64


class Continuation(NamedTuple):
    """What a prompt was continued with."""

    data: bytes  # the new bytes, without the stop string
    stopped: bool  # whether a stop string ended it
    slid: bool  # whether some of them were predicted from the last max_seq_len bytes only

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", errors="replace")


def generate(model: CausalLM, prompts: str | bytes | Sequence[str | bytes], *, max_new: int = 200,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop: str | bytes | Sequence[str | bytes] = (), batch_size: int = 64) -> list[Continuation]:
    """Continues each prompt by up to `max_new` bytes.

    Prompts of different lengths go through the network together, and each is continued as it
    would be alone: prompt i draws from its own random stream, fold_in(seed, i).

    Where positions are learned, bytes past max_seq_len are predicted from the last max_seq_len
    bytes (the window slides and is read anew for each of them, which is slow). Where there are
    none, the cache grows and decoding carries on past the trained length. Both are said in a
    warning.

    Args:
        temperature, top_k, top_p: see `Sampling`.
        stop: strings that end a continuation when they occur in it.
        batch_size: most prompts that go through the network at once.

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
    found: dict[int, Continuation] = {}
    for rows, chunks in _batches(freeze(model), texts, sampling, batch_size, BYTES,
                                 BUCKET if stops else max_new):
        for i, (data, stopped) in zip(rows, _until(stops, chunks, len(rows)), strict=True):
            found[i] = Continuation(data, stopped, _slides(len(texts[i]), len(data), window))
    return [found[i] for i in range(len(texts))]


class ContinuedIds(NamedTuple):
    """What token ids were continued with."""

    ids: np.ndarray  # int32 [n], without the one that ended them
    ended: bool  # whether one did


def generate_ids(model: CausalLM, prompts: Sequence[Sequence[int] | np.ndarray], *, max_new: int = 200,
                 temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
                 end_ids: Sequence[int] | None = None, batch_size: int = 64) -> list[ContinuedIds]:
    """Continues each prompt by up to `max_new` ids of the network's vocabulary; otherwise as `generate`.

    Args:
        prompts: token ids, each at least one; they may be of different lengths.
        end_ids: ids of which each ends a continuation; by default those of the configuration.

    Raises:
        InputError: an argument is out of range, or an id is none of the vocabulary.
    """
    _check_batch_size(batch_size)
    ids, ends = _ids("prompts", model, prompts), _ends(model, end_ids)
    vocab_size, sampling = model.config.vocab_size, Sampling(temperature, top_k, top_p, max_new, seed)
    _warn(model, ids, max_new)
    found: list[ContinuedIds | None] = [None] * len(ids)
    for rows, chunks in _batches(freeze(model), ids, sampling, batch_size, vocab_size,
                                 BUCKET if len(ends) else max_new):
        for i, made in zip(rows, _until_end(ends, chunks, len(rows)), strict=True):
            found[i] = made
    return [made for made in found if made is not None]


def stream_ids(model: CausalLM, prompt: Sequence[int] | np.ndarray, *, max_new: int,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
               end_ids: Sequence[int] | None = None, chunk: int = 1) -> Iterator[ContinuedIds]:
    """The new ids of one prompt as they come, at most `chunk` at a time; see `generate_ids`.

    Together they are what `generate_ids` gives, whatever the size of the chunks. Only the last may have
    `ended`; it may be empty.
    """
    if chunk < 1:
        raise InputError(f"chunk: expected at least 1, found {chunk}")
    ids, ends = _ids("prompt", model, [prompt]), _ends(model, end_ids)
    sampling = Sampling(temperature, top_k, top_p, max_new, seed)
    _warn(model, ids, max_new)
    chunks = _chunks(freeze(model), ids, range(1), sampling, chunk, model.config.vocab_size)
    return _to_the_end(ends, chunks)


class Chunk(NamedTuple):
    """Some new tokens `[rows, n]`, int32 or, of a stream, uint8; and for which rows the window slid."""

    new: np.ndarray
    slid: list[bool]


def stream(model: CausalLM, ids: Sequence[np.ndarray], *, max_new: int, temperature: float = 1.0,
           top_k: int = 0, top_p: float = 1.0, seed: int = 0, chunk: int = 1) -> Iterator[Chunk]:
    """The new bytes as they come, at most `chunk` at a time; see `generate`.

    They are the same whatever the size of the chunks.

    Args:
        ids: prompts, uint8, none of them empty; all go through the network at once.
    """
    sampling = Sampling(temperature, top_k, top_p, max_new, seed)
    if chunk < 1:
        raise InputError(f"chunk: expected at least 1, found {chunk}")
    _check(model, ids)
    _warn(model, ids, max_new)
    chunks = _chunks(freeze(model), ids, range(len(ids)), sampling, chunk, BYTES)
    return (made._replace(new=made.new.astype(np.uint8)) for made in chunks)


# ---------------------------------------------------------------------------------------------


def _texts(name: str, given: str | bytes | Sequence[str | bytes]) -> list[bytes]:
    """One text or several, as bytes."""
    texts = [given] if isinstance(given, str | bytes) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str | bytes) for text in texts):
        raise InputError(f"{name}: expected text, bytes or a list of them, found {given!r:.60}")
    try:
        return [text.encode() if isinstance(text, str) else text for text in texts]
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: not text: {error}") from None


def _ids(name: str, model: CausalLM, prompts: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
    """Prompts as arrays of ids that the network knows; `name` is what a refusal calls them."""
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


def _ends(model: CausalLM, given: Sequence[int] | None) -> Sequence[int]:
    return getattr(model.config, "end_ids", ()) if given is None else given


def _batches(model: CausalLM, ids: Sequence[np.ndarray], sampling: Sampling, batch_size: int, tokens: int,
             chunk: int) -> Iterator[tuple[list[int], Iterator[Chunk]]]:
    """Prompts of similar lengths together: which they are, and their continuations."""
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in range(0, len(ids), batch_size):
        rows = by_length[first:first + batch_size]
        yield rows, _chunks(model, [ids[i] for i in rows], rows, sampling, chunk, tokens)


def _window(model: CausalLM) -> int | None:
    """The most tokens that the network can read, or None where nothing limits them."""
    return model.config.max_seq_len if model.config.positions == "learned" else None


def _slides(length: int, n_new: int, window: int | None) -> bool:
    """Whether `n_new` bytes after `length` others cannot all be predicted from all before them."""
    return window is not None and n_new > 0 and length + n_new - 1 > window


def _check(model: CausalLM, ids: Sequence[np.ndarray]) -> None:
    if not model.reads_bytes:
        raise InputError(f"model: a {model.config.family} reads token ids, not bytes: "
                         "tilelli_jax.generate_ids continues them")
    for i, row in enumerate(ids):
        if len(row) == 0:
            which = f"prompt {i}" if len(ids) > 1 else "the prompt"
            raise InputError(f"{which} is empty; expected at least one byte")
    if model.config.vocab_size < BYTES:
        raise InputError(f"vocab_size: expected at least {BYTES} to continue bytes, "
                         f"found {model.config.vocab_size}")


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected a whole number ≥ 1, found {batch_size!r}")


def _warn(model: CausalLM, ids: Sequence[np.ndarray], max_new: int) -> None:
    """Says, to whoever called the caller of this, that the trained length will be passed."""
    trained = model.config.max_seq_len
    longest = max(map(len, ids), default=0)
    if _slides(longest, max_new, trained):
        does = (f"past {trained} each sees the last {trained} only" if _window(model)
                else f"past the trained length of {trained}")
        warnings.warn(f"decoding to {longest + max_new} tokens: {does}", stacklevel=3)


def _until(stops: Sequence[bytes], chunks: Iterator[Chunk], n_rows: int) -> list[tuple[bytes, bool]]:
    """Each row's bytes up to the first stop string in it, and whether there was one."""
    found = [(b"", False)] * n_rows
    for chunk in chunks:
        for i, more in enumerate(chunk.new):
            data, stopped = found[i]
            if not stopped:
                data += more.astype(np.uint8).tobytes()
                ends = [at for at in map(data.find, stops) if at >= 0]
                found[i] = (data[:min(ends)], True) if ends else (data, False)
        if all(stopped for _, stopped in found):
            break
    return found


def _until_end(ends: Sequence[int], chunks: Iterator[Chunk], n_rows: int) -> list[ContinuedIds]:
    """Each row's ids up to the first of `ends` among them, and whether there was one."""
    found = [ContinuedIds(np.zeros(0, np.int32), False)] * n_rows
    for chunk in chunks:
        for i, more in enumerate(chunk.new):
            ids, ended = found[i]
            if not ended:
                at = np.flatnonzero(np.isin(more, ends))
                found[i] = ContinuedIds(np.concatenate([ids, more[:at[0]] if len(at) else more]), len(at) > 0)
        if all(made.ended for made in found):
            break
    return found


def _to_the_end(ends: Sequence[int], chunks: Iterator[Chunk]) -> Iterator[ContinuedIds]:
    """One row's ids, piece by piece, up to the first of `ends`."""
    for chunk in chunks:
        made, = _until_end(ends, iter([chunk]), 1)
        yield made
        if made.ended:
            return


def _chunks(model: CausalLM, ids: Sequence[np.ndarray], streams: Sequence[int], sampling: Sampling,
            chunk: int, tokens: int) -> Iterator[Chunk]:
    """As `stream`, of a frozen model; row j draws from fold_in(seed, streams[j]).

    Args:
        tokens: how many of the vocabulary, from the first, may be drawn.
    """
    max_new, window = sampling.max_new, _window(model)
    texts = [np.asarray(row, np.int32) for row in ids]
    longest = max(map(len, texts))
    graph, params = nnx.split(model)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(np.array(streams))
    # As traced values: another temperature compiles nothing anew.
    how = (np.float32(sampling.temperature), np.int32(min(sampling.top_k, tokens)),
           np.float32(sampling.top_p))
    width = _bucket(chunk)
    made = 0

    def chunk_of(new: jax.Array, n: int) -> Chunk:
        slid = [_slides(len(row), n, window) for row in texts]
        made_now = np.asarray(new)[:, :n]
        texts[:] = [np.concatenate([row, more]) for row, more in zip(texts, made_now, strict=True)]
        return Chunk(made_now, slid)

    # Cached as far as every row has room in the window, ...
    room = max_new if window is None else min(max_new, window - longest)
    if room > 0:
        lengths = np.array([len(row) for row in texts], np.int32)
        padded = _pad(texts, _bucket(longest, window))
        logits, caches = _prefill(graph, params, padded, lengths, size=_bucket(longest + room, window))
        while made < room:
            n = min(chunk, room - made)
            new, logits, caches = _decode(graph, params, logits, caches, lengths + np.int32(made), keys,
                                          np.int32(made), np.int32(n), how, width=width, tokens=tokens)
            yield chunk_of(new, n)
            made += n
    # ... and then reading the window anew for every byte.
    while made < max_new:
        assert window is not None
        n = min(chunk, max_new - made)
        seen = [row[-window:] for row in texts]
        used = np.array([len(row) for row in seen], np.int32)
        new = _slide(graph, params, _pad(seen, window), used, keys, np.int32(made), np.int32(n), how,
                     width=width, tokens=tokens)
        yield chunk_of(new, n)
        made += n


def _draw(keys: jax.Array, count: jax.Array, logits: jax.Array, how: tuple[jax.Array, ...],
          tokens: int) -> jax.Array:
    """The next token of each row; `count` is how many new ones it has."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, count))(keys)
    return jax.vmap(lambda key, row: sample(key, row[:tokens], *how))(keys, logits)


@functools.partial(jax.jit, static_argnames=("graph", "size"))
def _prefill(graph: Any, params: Any, ids: jax.Array, lengths: jax.Array, *,
             size: int) -> tuple[jax.Array, Any]:
    return nnx.merge(graph, params).prefill(ids, lengths, size)


@functools.partial(jax.jit, static_argnames=("graph", "width", "tokens"), donate_argnames=("caches",))
def _decode(graph: Any, params: Any, logits: jax.Array, caches: Any, position: jax.Array,
            keys: jax.Array, made: jax.Array, n: jax.Array, how: tuple[jax.Array, ...], *,
            width: int, tokens: int) -> tuple[jax.Array, jax.Array, Any]:
    """n ≤ width tokens at the head of each row of `[rows, width]`, and logits and caches after them."""
    model = nnx.merge(graph, params)
    # A single row's caches go through the loop without their row axis. XLA:CPU drops an axis of
    # length 1 before a product, and where the loop keeps it, each byte's update is computed in both
    # forms, one of them on a copy of the whole cache.
    packed, unpacked = (((lambda cache: cache[0]), (lambda cache: cache[None])) if len(position) == 1
                        else ((lambda cache: cache), (lambda cache: cache)))

    def one(i: jax.Array, carry: Any) -> Any:
        new, logits, caches = carry
        ids = _draw(keys, made + i, logits, how, tokens)
        new = jax.lax.dynamic_update_index_in_dim(new, ids, i, axis=1)
        logits, caches = model.step(ids, jax.tree.map(unpacked, caches), position + i)
        return new, logits, jax.tree.map(packed, caches)

    new = jnp.zeros((len(position), width), jnp.int32)
    new, logits, caches = jax.lax.fori_loop(0, n, one, (new, logits, jax.tree.map(packed, caches)))
    return new, logits, jax.tree.map(unpacked, caches)


@functools.partial(jax.jit, static_argnames=("graph", "width", "tokens"))
def _slide(graph: Any, params: Any, seen: jax.Array, used: jax.Array, keys: jax.Array, made: jax.Array,
           n: jax.Array, how: tuple[jax.Array, ...], *, width: int, tokens: int) -> jax.Array:
    """As `_decode` without caches: `seen [rows, window]` holds the last `used [rows]` tokens."""
    model = nnx.merge(graph, params)
    window = seen.shape[1]

    def one(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        new, seen, used = carry
        logits = model(seen)
        last = jnp.take_along_axis(logits, (used - 1)[:, None, None], axis=1)[:, 0]
        ids = _draw(keys, made + i, last, how, tokens)
        new = jax.lax.dynamic_update_index_in_dim(new, ids, i, axis=1)
        full = used == window
        seen = jnp.where(full[:, None], jnp.roll(seen, -1, axis=1), seen)
        slot = jnp.where(full, window - 1, used)
        seen = jax.vmap(lambda row, at, token: row.at[at].set(token))(seen, slot, ids)
        return new, seen, jnp.minimum(used + 1, window)

    new = jnp.zeros((len(used), width), jnp.int32)
    return jax.lax.fori_loop(0, n, one, (new, seen, used))[0]


def _bucket(length: int, most: int | None = None) -> int:
    """`length` rounded up to a multiple of BUCKET, and past 512 to four sizes in each doubling."""
    step = max(BUCKET, (1 << (length - 1).bit_length()) // 8)
    rounded = -(-length // step) * step
    return rounded if most is None else min(rounded, most)


def _pad(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = row
    return padded
