"""The compiled programs of the engine, and the signals that it can compute in a prompt's pass."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.generation.decoding import BYTES
from tilelli_jax.models import freeze
from tilelli_jax.models.causal_lm import CausalLM
from tilelli_jax.models.sampling import sample
from tilelli_jax.nn.hooks import OFF, Recorded, Tap

SHORTEST = 64  # shortest padded prompt and smallest cache, in positions
MAX_TOP = 20  # most likely tokens that a request may ask for
QUESTION_WIDTHS = (16, 64, 256)  # numbers of positions to which questions are padded, besides the prompt's


class Signals(Protocol):
    """What is computed from the activations of a prompt's pass; `PromptSignals` is one."""

    @property
    def hooks(self) -> tuple[str, ...]: ...

    def prompt_outputs(self, model: Any, recorded: Recorded, question: jax.Array) -> Any:
        """Returns a tree of arrays whose first axis is the batch; see `PromptSignals`."""


@dataclasses.dataclass(frozen=True)
class FinalStream:
    """Signals: the residual stream after each layer at the last position, f32 `[batch, layers, d_model]`."""

    hooks: tuple[str, ...] = ("resid_post",)

    def prompt_outputs(self, model: Any, recorded: Recorded, question: jax.Array) -> jax.Array:
        return jnp.swapaxes(recorded[self.hooks[0]][:, :, -1], 0, 1).astype(jnp.float32)


class Choice(NamedTuple):
    """How the next token of each row is chosen; `keys` is the key data of the rows' random streams."""

    keys: Any
    n_done: Any
    temperature: Any
    top_k: Any
    top_p: Any
    n_top: Any


class Chosen(NamedTuple):
    """The chosen tokens `[rows]`, their log-probabilities, and the most likely tokens `[rows, MAX_TOP]`."""

    ids: Any
    log_probs: Any
    top_ids: Any
    top_log_probs: Any


class Programs:
    """The programs that decode a fixed number of slots, each compiled once for its shapes.

    Args:
        slots: number of requests that are decoded at once.
        max_len: maximum number of tokens of a prompt with its continuation.
        signals: computed from each prompt's pass.
        reads_questions: whether the signals use the activations at the question's positions.

    Attributes:
        vocab_size: only the first so many tokens are chosen.
        sizes: numbers of positions for which caches have room, which are also the padded lengths of prompts.
    """

    def __init__(self, model: CausalLM, slots: int, max_len: int, signals: Signals | None,
                 reads_questions: bool) -> None:
        self.slots, self.signals, self._reads_questions = slots, signals, reads_questions
        self.vocab_size = BYTES if model.is_byte_level else model.config.vocab_size
        self._graph, self.params = nnx.split(freeze(model))
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        sizes = [SHORTEST]
        while sizes[-1] < max_len:
            sizes.append(2 * sizes[-1])
        self.sizes = [*(size for size in sizes if size < max_len), max_len]

    def size(self, n: int) -> int:
        """The smallest size with room for n positions."""
        return next(size for size in self.sizes if size >= n)

    def widths(self, time: int) -> list[int]:
        """Numbers of positions to which questions in prompts of a padded length are padded."""
        if self.signals is None or not self._reads_questions:
            return [0]
        return [*(width for width in QUESTION_WIDTHS if width < time), time]

    def all(self) -> Iterator[Callable[[], object]]:
        """Functions that compile the programs, one each."""
        yield self.stream
        for time in self.sizes:
            for width in self.widths(time):
                yield functools.partial(self.prefill, time, width)
            for size in self.sizes:
                if size >= time:
                    yield functools.partial(self.insert, time, size)
            yield functools.partial(self.step, time)
            yield functools.partial(self.score, time)
        for pair in itertools.pairwise(self.sizes):
            yield functools.partial(self.grow, *pair)

    def empty(self, size: int) -> Any:
        """Caches of all slots, of zeros."""
        zeros = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), self.caches(self.slots, size))
        return jax.device_put(zeros, may_alias=False)  # compiles nothing, unlike jnp.zeros

    def _compiled(self, key: tuple[Any, ...], function: Callable[..., Any],
                  arguments: Callable[[], Sequence[Any]], donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """The compiled program under this key; compiles it if it is new.

        Args:
            arguments: returns the shapes of its arguments.
        """
        if key not in self._programs:
            self._programs[key] = jax.jit(function, donate_argnums=donate).lower(*arguments()).compile()
        return self._programs[key]

    @functools.cache  # noqa: B019, there is one instance for each engine
    def caches(self, rows: int, size: int) -> Any:
        """Shapes of the caches of this many rows."""
        def caches(params: Any, ids: jax.Array, lengths: jax.Array) -> Any:
            return nnx.merge(self._graph, params).prefill(ids, lengths, size)[1]
        return jax.eval_shape(caches, self.params, _shape((rows, min(size, SHORTEST)), np.int32),
                              _shape((rows,), np.int32))

    def stream(self) -> Callable[..., Any]:
        """Seed and index → key data of the random stream, as `generate` derives it."""
        def stream(seed: jax.Array, index: jax.Array) -> jax.Array:
            return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), index))
        return self._compiled(("stream",), stream, lambda: [_shape((), np.uint32)] * 2)

    def prefill(self, time: int, width: int) -> Callable[..., Any]:
        """Processes one prompt: its caches, its first new token, and its signals."""
        signals = self.signals

        def prefill(params: Any, ids: jax.Array, length: jax.Array, positions: jax.Array, question: jax.Array,
                    choice: Choice) -> Any:
            model = nnx.merge(self._graph, params)
            tap = OFF if signals is None else Tap(record=tuple(hook for hook in signals.hooks if hook),
                                                  positions=positions)
            logits, caches, recorded = model.prefill_tapped(ids, length, time, tap)
            outputs = None if signals is None else signals.prompt_outputs(model, recorded, question)
            return caches, choose(logits, choice, self.vocab_size), outputs
        return self._compiled(("prefill", time, width), prefill, lambda: (
            self.params, _shape((1, time), np.int32), _shape((1,), np.int32),
            _shape((1, width + 1), np.int32), _shape((1, width + 1), bool), choice_shapes(1)))

    def insert(self, time: int, size: int) -> Callable[..., Any]:
        """Copies the caches of a prompt into a slot."""
        def insert(caches: Any, row: Any, slot: jax.Array) -> Any:
            def one(all_rows: jax.Array, new: jax.Array) -> jax.Array:
                new = jnp.pad(new, [(0, n - have) for n, have in
                                    zip((1, *all_rows.shape[1:]), new.shape, strict=True)])
                return jax.lax.dynamic_update_index_in_dim(all_rows, new[0], slot, 0)
            return jax.tree.map(one, caches, row)
        return self._compiled(("insert", time, size), insert, lambda: (
            self.caches(self.slots, size), self.caches(1, time), _shape((), np.int32)), donate=(0,))

    def grow(self, size: int, larger: int) -> Callable[..., Any]:
        """Gives the caches room for more positions. Until a window is full, position p is in slot p."""
        def grow(caches: Any) -> Any:
            return jax.tree.map(lambda cache, shape: jnp.pad(cache, [
                (0, n - have) for n, have in zip(shape.shape, cache.shape, strict=True)]),
                caches, self.caches(self.slots, larger))
        return self._compiled(("grow", size, larger), grow, lambda: [self.caches(self.slots, size)])

    def step(self, size: int) -> Callable[..., Any]:
        """Decodes one token of every slot."""
        def step(params: Any, caches: Any, ids: jax.Array, position: jax.Array, choice: Choice) -> Any:
            logits, caches = nnx.merge(self._graph, params).step(ids, caches, position)
            return caches, choose(logits, choice, self.vocab_size)
        return self._compiled(("step", size), step, lambda: (
            self.params, self.caches(self.slots, size), *[_shape((self.slots,), np.int32)] * 2,
            choice_shapes(self.slots)), donate=(1,))

    def score(self, time: int) -> Callable[..., Any]:
        """Log-probabilities of a text's tokens; see `CausalLM.ranked`."""
        def score(params: Any, ids: jax.Array, targets: jax.Array) -> Any:
            n_top = min(MAX_TOP, self.vocab_size)
            return nnx.merge(self._graph, params).ranked(ids, targets, n_top, self.vocab_size)
        return self._compiled(("score", time), score, lambda: (
            self.params, *[_shape((1, time), np.int32)] * 2))


# ---------------------------------------------------------------------------------------------


def choose(logits: jax.Array, choice: Choice, tokens: int) -> Chosen:
    """Chooses the next tokens. What no row needs is not computed: sampling costs more than a maximum."""
    logits = logits[:, :tokens]
    log_probs = jax.nn.log_softmax(logits)
    rows = jnp.arange(len(logits))
    best = jnp.argmax(logits, axis=1).astype(jnp.int32)

    def sampled() -> jax.Array:
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(choice.keys), choice.n_done)

        def draw(truncate: bool) -> jax.Array:
            def one(key: jax.Array, row: jax.Array, temperature: jax.Array, top_k: jax.Array,
                    top_p: jax.Array) -> jax.Array:
                if not truncate:
                    top_k, top_p = jnp.int32(0), jnp.float32(1)
                return sample(key, row, temperature, top_k, top_p)
            return jax.vmap(one)(keys, logits, choice.temperature, choice.top_k, choice.top_p)
        return jax.lax.cond(jnp.any((choice.top_k > 0) | (choice.top_p < 1)),
                            lambda: draw(True), lambda: draw(False))
    ids = jax.lax.cond(jnp.any(choice.temperature > 0), sampled, lambda: best)
    ids = jnp.where(choice.temperature > 0, ids, best)
    n_top = min(MAX_TOP, tokens)
    top_log_probs, top_ids = jax.lax.cond(
        jnp.any(choice.n_top > 0), lambda: tuple(jax.lax.top_k(log_probs, n_top)),
        lambda: (jnp.zeros((len(logits), n_top)), jnp.zeros((len(logits), n_top), jnp.int32)))
    return Chosen(ids, log_probs[rows, ids], top_ids, top_log_probs)


def no_choices(rows: int) -> Choice:
    """Choices of the most likely token, for slots without a request."""
    return Choice(np.zeros((rows, 2), np.uint32), np.zeros(rows, np.int32), np.zeros(rows, np.float32),
                   np.zeros(rows, np.int32), np.ones(rows, np.float32), np.zeros(rows, np.int32))


def choice_shapes(rows: int) -> Choice:
    return Choice(*(_shape(value.shape, value.dtype) for value in no_choices(rows)))


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
