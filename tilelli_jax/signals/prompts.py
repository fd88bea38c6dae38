"""Computes prompt signals in one forward pass, without generation: by default crystallisation and MLP-write
specificity."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.cli import progress
from tilelli_jax.nn.hooks import Recorded, Tap
from tilelli_jax.parallel.sharding import Mesh, replicated
from tilelli_jax.signals.batching import SHORTEST, Batch, batches, bucket, max_time, on_devices, padded_ids
from tilelli_jax.signals.crystallisation import Crystallisation, LayerActivations, crystallisation
from tilelli_jax.signals.lens import CHUNK

WORK = 6  # number of arrays of the size of a logits slice that XLA may hold at once


class PromptIds(NamedTuple):
    """Token ids, and the span `[start, stop)` of the question, which may be empty."""

    ids: Sequence[int]
    start: int
    stop: int


class PromptOutputs(NamedTuple):
    """Signals of one prompt.

    Attributes:
        crystallisation: see `Crystallisation`, without the batch axis.
        final: f32 `[layers, d_model]`, the residual stream after each layer at the last position, before
            the final norm.
    """

    crystallisation: Crystallisation
    final: Any


@dataclasses.dataclass(frozen=True)
class PromptSignals:
    """Function that computes the signals of a batch under jit. Equal instances share a compiled program.

    Attributes:
        hooks: see `lens_hooks`.
        chunk, rounded: see `PromptReader`.
    """

    hooks: tuple[str, str, str, str]
    chunk: int = CHUNK
    rounded: bool = False

    def __call__(self, ids: jax.Array, positions: jax.Array, question: jax.Array, model: Any) -> Any:
        """Returns a tree of arrays whose first axis is the batch.

        Args:
            ids: int32 `[batch, time]`, zeros after each prompt.
            positions: int32 `[batch, n]`: the question's positions, arbitrary padding, and as the last
                entry the prompt's last position.
            question: bool `[batch, n]`, True at the question's positions.
        """
        tap = Tap(record=tuple(hook for hook in self.hooks if hook), positions=positions)
        recorded = model.tapped(ids, tap)[1]  # the logits are not used, so XLA does not compute them
        return self.prompt_outputs(model, recorded, question)

    def prompt_outputs(self, model: Any, recorded: Recorded, question: jax.Array) -> PromptOutputs:
        """Crystallisation and MLP-write specificity from the activations recorded at the positions."""
        stream, write, base, attention = self.hooks
        activations = LayerActivations(recorded[stream], recorded[write], recorded[base],
                                       recorded[attention] if attention else None)
        features = crystallisation(model.unembedding(), activations, question, chunk=self.chunk,
                                   rounded=self.rounded)
        return PromptOutputs(features, jnp.swapaxes(activations.stream[:, :, -1], 0, 1).astype(jnp.float32))


@functools.lru_cache(maxsize=32)
def _compiled(signals: PromptSignals, graphs: tuple[Any, ...], mesh: Mesh | None) -> Callable[..., Any]:
    """The compiled program, shared by all networks of the same structure."""
    def read(params: Any, ids: jax.Array, positions: jax.Array, question: jax.Array) -> Any:
        networks = [nnx.merge(graph, network_params)
                    for graph, network_params in zip(graphs, params, strict=True)]
        return signals(ids, positions, question, *networks)
    return jax.jit(read, out_shardings=None if mesh is None else replicated(mesh))


class PromptReader:
    """Computes the signals of prompts with one network; the compiled program is reused between calls.

    Args:
        batch_size: maximum number of prompts per batch.
        max_bytes: limit on scratch memory, in bytes; batches that would need more are made smaller (at
            least one prompt). Counted are the recorded activations and one slice of the logits, not the
            memory of the network's forward pass.
        chunk: number of tokens per slice of the vocabulary in the logit lens.
        rounded: round every step of the logit lens to bfloat16, as for the published features.
        mesh: devices that share each batch; batch_size is rounded up to a multiple of their number.
        signals: function that computes the signals; by default crystallisation and MLP-write specificity.
        aux_models: additional networks that are passed to `signals`.
        shortest: length to which shorter prompts are padded; questions to half of it, because the logit lens
            of their positions takes most of the time. Each length is compiled: for many short prompts of a
            small network, a long one is faster.
    """

    def __init__(self, model: Any, *, batch_size: int = 16, max_bytes: int = 2**31, chunk: int = CHUNK,
                 rounded: bool = False, mesh: Mesh | None = None, signals: PromptSignals | None = None,
                 aux_models: Sequence[Any] = (), shortest: int = SHORTEST) -> None:
        self.batch_size, self.max_bytes, self.chunk, self.mesh = batch_size, max_bytes, chunk, mesh
        self.config, self.max_tokens, self.shortest = model.config, max_time(model), shortest
        parts = [nnx.split(network) for network in (model, *aux_models)]
        self._params = [params for _, params in parts]
        self.hooks = lens_hooks(model)
        self._read = _compiled(signals or PromptSignals(self.hooks, chunk, rounded),
                               tuple(graph for graph, _ in parts), mesh)

    def bytes_of(self, positions: int) -> int:
        """Scratch memory, in bytes, for one prompt with this number of recorded positions."""
        layers, d = self.config.n_layers, self.config.d_model
        rows = layers * (positions + 6)
        return rows * (6 * d + WORK * min(self.chunk, self.config.vocab_size)) * 4

    def __call__(self, prompts: Sequence[PromptIds], label: str = "reading",
                 advance: Callable[[int], object] | None = None) -> Iterator[tuple[int, Any]]:
        """Yields (index, signals) for each prompt, in arbitrary order.

        Args:
            label: name of its progress.
            advance: called with the number of prompts of each finished batch; None shows progress if there
                is more than one batch.

        Raises:
            ValueError: a prompt is empty or longer than the network's context, or its question is not
                inside the prompt.
        """
        check_lengths([prompt.ids for prompt in prompts], self.max_tokens)
        for i, prompt in enumerate(prompts):
            if not 0 <= prompt.start <= prompt.stop <= len(prompt.ids):
                raise ValueError(f"prompt {i}: expected the question inside its {len(prompt.ids)} ids, found "
                                 f"[{prompt.start}, {prompt.stop})")
        questions = [prompt.stop - prompt.start for prompt in prompts]  # their lengths

        def max_rows(candidates: list[int]) -> int:
            positions = self._width(max(questions[i] for i in candidates)) + 1
            return self.max_bytes // self.bytes_of(positions)
        quiet = advance is not None or len(prompts) <= self.batch_size
        with progress.shown(len(prompts), label, "prompt", quiet=quiet) as own:
            for batch in batches([len(prompt.ids) for prompt in prompts], self.batch_size,
                                 limit=self.max_tokens, shortest=self.shortest, mesh=self.mesh,
                                 widths=questions, max_rows=max_rows, shrink=True):
                yield from zip(batch.indices, self._batch(batch, prompts), strict=True)
                (advance or own)(len(batch.indices))

    def _width(self, question: int) -> int:
        """The number of positions to which questions of at most this length are padded."""
        return bucket(question, shortest=max(self.shortest // 2, 1))

    def _batch(self, batch: Batch, prompts: Sequence[PromptIds]) -> list[Any]:
        rows = [prompts[i] for i in batch.filled]
        width = self._width(max(prompt.stop - prompt.start for prompt in rows))
        positions, question = (np.zeros((len(rows), width + 1), dtype) for dtype in (np.int32, bool))
        for row, prompt in enumerate(rows):
            n = prompt.stop - prompt.start
            positions[row, :n], question[row, :n] = np.arange(prompt.start, prompt.stop), True
            positions[row, -1] = len(prompt.ids) - 1
        arrays = padded_ids([prompt.ids for prompt in rows], batch.time), positions, question
        results = jax.device_get(self._read(self._params, *on_devices(arrays, self.mesh)))
        return [jax.tree.map(lambda array, row=row: array[row], results) for row in range(len(batch.indices))]


def lens_hooks(model: Any) -> tuple[str, str, str, str]:
    """Hooks of the residual stream, the MLP write, the stream to which it is added, and attention's output.

    The last is "" if the network has none. The write of a routed block is its mixed output. With parallel
    residuals the write is added to the stream before the block.
    """
    hooks = model.hooks
    return ("resid_post", "mlp_write" if "mlp_write" in hooks else "mix",
            "resid_mid" if "resid_mid" in hooks else "resid_pre", "attn_out" if "attn_out" in hooks else "")


def check_lengths(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Raises ValueError if a prompt is empty or longer than `limit` (None: no limit)."""
    expected = "at least 1 id" if limit is None else f"1 to {limit} ids"
    for i, ids in enumerate(prompts):
        if not len(ids) or (limit is not None and len(ids) > limit):
            raise ValueError(f"prompt {i}: expected {expected}, found {len(ids)}")
