"""One pass of each prompt, nothing generated: crystallisation and writes (signals A and B)."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax import progress
from tilelli_jax.nn.tap import Recorded, Tap
from tilelli_jax.sharding import Mesh, place_rows, replicated, whole_batch
from tilelli_jax.signals.crystallisation import Crystallisation, LayerActivations, crystallisation
from tilelli_jax.signals.lens import CHUNK
from tilelli_jax.signals.scoring import max_time, padded_time

QUESTION_BUCKET = 8  # questions' lengths are rounded up to multiples: as many compilations as there are
WORK = 6  # arrays as large as a piece of the logits that XLA may hold at once


class Prompt(NamedTuple):
    """Token ids, and where the question stands in them: `[start, stop)`, maybe empty."""

    ids: Sequence[int]
    start: int
    stop: int


class PromptOutputs(NamedTuple):
    """Of one prompt: `crystallisation` without the batch axis, and `final` f32 `[layers, d_model]`.

    The latter is the stream after each layer at the last position, before the final norm.
    """

    crystallisation: Crystallisation
    final: Any


@dataclasses.dataclass(frozen=True)
class PromptSignals:
    """What is read of a batch, traced: of two that are equal, programs are compiled once.

    Attributes:
        places: see `places_of`.
        chunk, rounded: see `Reader`.
    """

    places: tuple[str, str, str, str]
    chunk: int = CHUNK
    rounded: bool = False

    def __call__(self, ids: jax.Array, positions: jax.Array, question: jax.Array, model: Any) -> Any:
        """Any tree of arrays whose first axis is the batch's.

        Args:
            ids: int32 `[batch, time]`, zeros after each prompt.
            positions: int32 `[batch, n]`: the question's, filled up with any, and last the prompt's last.
            question: bool `[batch, n]`: which of them are the question's.
        """
        tap = Tap(record=tuple(place for place in self.places if place), positions=positions)
        seen = model.tapped(ids, tap)[1]  # the logits are not asked for, and not computed
        return self.crystallised(model, seen, question)

    def crystallised(self, model: Any, seen: Recorded, question: jax.Array) -> PromptOutputs:
        """Of what a tap recorded at the positions."""
        stream, write, beside, attention = self.places
        inner = LayerActivations(seen[stream], seen[write], seen[beside], seen[attention] if attention else None)
        found = crystallisation(model.unembedding(), inner, question, chunk=self.chunk, rounded=self.rounded)
        return PromptOutputs(found, jnp.swapaxes(inner.stream[:, :, -1], 0, 1).astype(jnp.float32))


@functools.lru_cache(maxsize=32)
def _compiled(look: PromptSignals, graphs: tuple[Any, ...], mesh: Mesh | None) -> Callable[..., Any]:
    """One program for all networks of one structure: a study asks many."""
    def read(params: Any, ids: jax.Array, positions: jax.Array, question: jax.Array) -> Any:
        networks = [nnx.merge(graph, one) for graph, one in zip(graphs, params, strict=True)]
        return look(ids, positions, question, *networks)
    return jax.jit(read, out_shardings=None if mesh is None else replicated(mesh))


class PromptReader:
    """Reads prompts with one network, and keeps what was compiled for the next call.

    Args:
        batch_size: prompts at once, at most.
        max_bytes: of scratch memory; a batch is made smaller where it would need more (one prompt at
            least). What is counted: activations at the positions that are looked at, and a piece of the
            logits; the network's own pass is not.
        chunk: tokens of the vocabulary at a time.
        rounded: the lens in bfloat16, step by step, as the published features were made.
        mesh: devices to share each batch; batch_size is rounded up to a multiple of their number.
        look: what is read; by default signals A and B.
        aids: further networks that it is given.
        bucket: to a multiple of what lengths of questions are rounded up, and of prompts if it is more than
            they are anyway. Each size is compiled: of many short prompts a coarse one is the faster.
    """

    def __init__(self, model: Any, *, batch_size: int = 16, max_bytes: int = 2**31, chunk: int = CHUNK,
                 rounded: bool = False, mesh: Mesh | None = None, look: PromptSignals | None = None,
                 aids: Sequence[Any] = (), bucket: int = QUESTION_BUCKET) -> None:
        self.batch_size, self.max_bytes, self.chunk, self.mesh = batch_size, max_bytes, chunk, mesh
        self.config, self.bucket, self.most = model.config, bucket, max_time(model)
        parts = [nnx.split(network) for network in (model, *aids)]
        self._params = [params for _, params in parts]
        self._read = _compiled(look or PromptSignals(places_of(model), chunk, rounded),
                               tuple(graph for graph, _ in parts), mesh)

    def bytes_of(self, positions: int) -> int:
        """Scratch memory for one prompt with so many positions that are looked at."""
        layers, d = self.config.n_layers, self.config.d_model
        rows = layers * (positions + 6)
        return rows * (6 * d + WORK * min(self.chunk, self.config.vocab_size)) * 4

    def __call__(self, prompts: Sequence[Prompt], what: str = "reading") -> Iterator[tuple[int, Any]]:
        """Each prompt's signals, in no order of theirs: (index, what `look` gives). Shows progress
        where there is more than one batch.

        Raises:
            ValueError: a prompt is empty, longer than the network reads, or its question not inside it.
        """
        check_lengths([prompt.ids for prompt in prompts], self.most)
        for i, prompt in enumerate(prompts):
            if not 0 <= prompt.start <= prompt.stop <= len(prompt.ids):
                raise ValueError(f"prompt {i}: expected the question inside its {len(prompt.ids)} ids, found "
                                 f"[{prompt.start}, {prompt.stop})")
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), -_length(prompts[i]), i))
        with progress.shown(len(prompts), what, "prompt", quiet=len(prompts) <= self.batch_size) as advance:
            start = 0
            while start < len(order):
                chosen = order[start:start + self._rows(prompts, order[start:start + self.batch_size])]
                yield from zip(chosen, self._batch([prompts[i] for i in chosen]), strict=True)
                start += len(chosen)
                advance(len(chosen))

    def _rows(self, prompts: Sequence[Prompt], candidates: Sequence[int]) -> int:
        """How many of the next prompts go together."""
        positions = _up(max(_length(prompts[i]) for i in candidates), self.bucket) + 1
        fit = max(1, self.max_bytes // self.bytes_of(positions))
        rows = self.batch_size if fit >= self.batch_size else 1 << (fit.bit_length() - 1)
        devices = whole_batch(1, self.mesh)
        return max(1, rows // devices) * devices

    def _batch(self, prompts: Sequence[Prompt]) -> list[Any]:
        # One of few sizes, each of which is compiled: powers of two, or the whole.
        rows = whole_batch(min(self.batch_size, 1 << (len(prompts) - 1).bit_length()), self.mesh)
        longest = max(len(prompt.ids) for prompt in prompts)
        time = padded_time(min(_up(longest, self.bucket), self.most or sys.maxsize), self.most)
        width = _up(max(map(_length, prompts)), self.bucket)
        ids = np.zeros((rows, time), np.int32)
        positions, question = np.zeros((rows, width + 1), np.int32), np.zeros((rows, width + 1), bool)
        for row, prompt in enumerate(prompts):
            ids[row, :len(prompt.ids)] = prompt.ids
            n = _length(prompt)
            positions[row, :n], question[row, :n] = np.arange(prompt.start, prompt.stop), True
            positions[row, -1] = len(prompt.ids) - 1
        given = (ids, positions, question)
        placed = given if self.mesh is None else tuple(place_rows(array, self.mesh, rows) for array in given)
        found = jax.device_get(self._read(self._params, *placed))
        return [jax.tree.map(lambda array, row=row: array[row], found) for row in range(len(prompts))]


def places_of(model: Any) -> tuple[str, str, str, str]:
    """Where a network's stream, its write, what that is added to, and attention's write are; "" for none.

    A routed block's write is all that it adds; with parallel residuals a write is added to the stream before
    the block.
    """
    there = model.places
    return ("resid_post", "mlp_write" if "mlp_write" in there else "mix",
            "resid_mid" if "resid_mid" in there else "resid_pre", "attn_out" if "attn_out" in there else "")


def check_lengths(prompts: Sequence[Sequence[int]], most: int | None) -> None:
    """Raises ValueError where a prompt is empty, or longer than a network reads."""
    wanted = "at least 1 id" if most is None else f"1 to {most} ids"
    for i, ids in enumerate(prompts):
        if not len(ids) or (most is not None and len(ids) > most):
            raise ValueError(f"prompt {i}: expected {wanted}, found {len(ids)}")


def _length(prompt: Prompt) -> int:
    return prompt.stop - prompt.start


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
