"""The interface of causal language models, which decoding, training and the signals use."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.nn.hooks import OFF, Recorded, Tap
from tilelli_jax.nn.unembed import Unembedding
from tilelli_jax.parallel.sharding import split_batch

Cache = Any
CHUNK = 1 << 25  # maximum number of logits (128 MiB) that `nll` computes at once


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Section):
    """How a network is computed; independent of its parameters."""

    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "type of operands and activations; norms and softmax are always in float32")
    scan_layers: bool = setting(
        True, "compile one block and scan it over the layers, so that compile time does not grow with depth")
    remat: bool = setting(False, "recompute each block's activations in the backward pass, to save memory")
    host_tables: bool = setting(
        False, "keep Gemma's table of per-layer embeddings in host memory and read it by row")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype: expected float32 or bfloat16, found {self.dtype!r}")


class CausalLM(nnx.Module):
    """Interface of causal language models, used by decoding and by the signals.

    `model(ids [batch, time] int) -> logits [batch, time, vocab] f32`, of the next token.
    """

    hooks: tuple[str, ...]
    config: Any
    is_byte_level = False  # whether the tokens are bytes instead of a tokenizer's

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """ids `[batch, time]` → logits `[batch, time, vocab]`, f32.

        Args:
            mask: bool `[batch, time]`, False at padding, which may be on either side; the unmasked ids of
                a row are contiguous. Not needed if all padding is on the right.

        Raises:
            ValueError: ids are not integers `[batch, time]` or outside the vocabulary (checked only
                for concrete arrays, not under jit); the mask has another shape or is not contiguous; time
                exceeds the table of learned positions.
        """
        ids = jnp.asarray(ids)
        check_ids("ids", ids, self.config.vocab_size)
        if mask is None:
            return self.tapped(ids, OFF)[0]
        if mask.shape != ids.shape:
            raise ValueError(f"mask: expected the shape of ids {list(ids.shape)}, found {list(mask.shape)}")
        if not isinstance(mask, jax.core.Tracer):
            edges = np.diff(np.pad(np.asarray(mask, bool).astype(np.int8), ((0, 0), (1, 0))), axis=1) == 1
            if (edges.sum(1) > 1).any():
                raise ValueError("mask: expected contiguous unmasked ids in each row, found gaps")
        # Roll the rows to position 0. A causal network is not affected by the padding after them.
        start = jnp.argmax(jnp.asarray(mask).astype(bool), axis=1)
        return _rolled(self.tapped(_rolled(ids, start), OFF)[0], -start)

    def tapped(self, ids: jax.Array, tap: Tap) -> tuple[jax.Array, Recorded]:
        """Returns the logits and the activations that the tap recorded (see `nn/hooks.py`).

        Activations inside the blocks are `[layers, batch, time, …]`, all others `[batch, time, …]`. With a
        tap that edits or records only some layers, the layers run separately instead of as one scanned
        block.

        Raises:
            ValueError: this network has no such hook or layer.
        """
        hidden, recorded = self._hidden(ids, tap)
        return tap("logits", self._unembedded(hidden), recorded), recorded

    def nll(self, ids: jax.Array, tap: Tap = OFF) -> tuple[jax.Array, Recorded]:
        """Returns the NLL of each next token, in nats, and the activations that the tap recorded.

        ids `[batch, time]` → f32 `[batch, time − 1]`. If there are more than CHUNK logits, they are
        computed for a few positions at a time, unless the tap records or edits them.

        Raises:
            ValueError: this network has no such hook or layer.
        """
        if self._chunk_time(len(ids)) >= ids.shape[1] or "logits" in (*tap.record, *tap.edit):
            logits, recorded = self.tapped(ids, tap)
            return _cross_entropy(logits[:, :-1], ids[:, 1:]), recorded
        hidden, recorded = self._hidden(ids, tap)
        return self._in_chunks(_cross_entropy, hidden[:, :-1], ids[:, 1:]), recorded

    def score(self, ids: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compares a target with the prediction after each id; both are `[batch, time]`.

        Returns:
            The NLL of the targets in nats, f32 `[batch, time]`; and whether each target is the most probable
            token, bool `[batch, time]`. The logits are computed in chunks, as by `nll`.
        """
        def compare(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _cross_entropy(logits, targets), jnp.argmax(logits, axis=-1) == targets
        return self._in_chunks(compare, self._hidden(ids, OFF)[0], targets)

    def ranked(self, ids: jax.Array, targets: jax.Array, k: int, tokens: int | None = None
               ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Log-probabilities of targets `[batch, time]` after each id, and of the k most likely tokens.

        Args:
            tokens: only the first so many of the vocabulary count; by default all.

        Returns:
            Log-probabilities of the targets in nats, f32 `[batch, time]`; the most likely tokens, int32
            `[batch, time, k]`, and their log-probabilities. The logits are computed in chunks, as by `nll`.
        """
        def compare(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            log_probs = jax.nn.log_softmax(logits[..., :tokens])
            top, best = jax.lax.top_k(log_probs, k)
            return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0], best, top
        return self._in_chunks(compare, self._hidden(ids, OFF)[0], targets)

    def _chunk_time(self, batch: int) -> int:
        """The number of positions whose logits are computed together."""
        return max(1, CHUNK // (batch * self.config.vocab_size))

    def _in_chunks(self, measure: Callable[[jax.Array, jax.Array], Any], hidden: jax.Array,
                   targets: jax.Array) -> Any:
        """`measure(logits, targets)` of each position, `[batch, time, …]` or a tree of such arrays."""
        batch, time = targets.shape

        def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> Any:
            hidden, targets = chunk
            return measure(self._unembedded(split_batch(hidden)), targets)
        n = -(-time // self._chunk_time(batch))
        chunks = jax.lax.map(of_chunk, (_chunks(hidden, n), _chunks(targets, n)))
        def joined(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :time]
        return jax.tree.map(joined, chunks)

    @abc.abstractmethod
    def _hidden(self, ids: jax.Array, tap: Tap) -> tuple[jax.Array, Recorded]:
        """The activations at `hidden`, `[batch, time, d_model]`, and those that the tap recorded so far."""

    @abc.abstractmethod
    def _unembedded(self, hidden: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → logits `[batch, time, vocab]`, f32."""

    @abc.abstractmethod
    def unembedding(self) -> Unembedding:
        """The map from the last residual stream to the logits."""

    def prefill(self, ids: jax.Array, lengths: jax.Array, size: int,
                prefix: list[Cache] | None = None) -> tuple[jax.Array, list[Cache]]:
        """Processes prompts and fills the caches.

        Args:
            ids: `[batch, time]`; ids after a row's length are ignored.
            lengths: `[batch]`, number of ids in each prompt.
            size: number of positions in the cache, ≥ time with the prefix.
            prefix: the caches of a beginning that all prompts share, of at most `longest_prefix` ids, from
                `prefill` of that one row with `size` its length; ids and lengths are without it.

        Returns:
            Logits `[batch, vocab]` after each row's last id, and the caches.
        """
        logits, caches, _ = self.prefill_tapped(ids, lengths, size, OFF, prefix)
        return logits, caches

    @abc.abstractmethod
    def prefill_tapped(self, ids: jax.Array, lengths: jax.Array, size: int, tap: Tap,
                       prefix: list[Cache] | None = None) -> tuple[jax.Array, list[Cache], Recorded]:
        """As `prefill`, with what the tap recorded at the hooks inside the blocks; see `tapped`."""

    def longest_prefix(self) -> int:
        """The number of ids that the prefix of `prefill` may have; 0: none is supported."""
        return 0

    def step(self, ids: jax.Array, caches: list[Cache],
             position: jax.Array) -> tuple[jax.Array, list[Cache]]:
        """One id `[batch]` at `position [batch]` → logits `[batch, vocab]` and the updated caches."""
        logits, caches, _ = self.step_with_streams(ids, caches, position)
        return logits, caches

    @abc.abstractmethod
    def step_with_streams(self, ids: jax.Array, caches: list[Cache], position: jax.Array
                          ) -> tuple[jax.Array, list[Cache], jax.Array]:
        """As `step`, with the residual stream after each layer, `[layers, batch, d_model]`."""

    def unroll(self) -> None:
        """Separates stacked layers, which makes decoding faster. Does nothing by default."""


def check_ids(name: str, ids: jax.Array, vocab_size: int) -> None:
    """Raises ValueError if ids are not `[batch, time]` or, for concrete arrays, outside the vocabulary."""
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers [batch, time], found {ids.dtype} {list(ids.shape)}")
    if not isinstance(ids, jax.core.Tracer) and ids.size and ids.is_fully_addressable:
        values = np.asarray(ids)
        low, high = values.min(), values.max()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name}: expected 0 to {vocab_size - 1}, found {low if low < 0 else high}")


def at_last(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Selects each row's last position of `[batch, time, …]`: `[batch, 1, …]`."""
    last = jnp.maximum(lengths - 1, 0).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, last, axis=1)


@jax.named_scope("loss")
def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def _chunks(x: jax.Array, n: int) -> jax.Array:
    """Splits `[batch, time, …]` into n chunks of equal length, zero-padding the last: `[n, batch, …]`."""
    time = -(-x.shape[1] // n)
    x = jnp.pad(x, ((0, 0), (0, n * time - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], n, time, *x.shape[2:]), 1, 0)


def _rolled(x: jax.Array, start: jax.Array) -> jax.Array:
    """Rolls row b of `[batch, time, …]` so that it begins at position start[b]."""
    positions = (jnp.arange(x.shape[1]) + start[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, positions.reshape(*positions.shape, *(1,) * (x.ndim - 2)), axis=1)
