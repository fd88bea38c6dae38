"""NLL of texts under a network, with recorded activations, in batches of similar lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.cli import progress
from tilelli_jax.nn.hooks import OFF, MakeTap, Recorded, Tap
from tilelli_jax.parallel.sharding import Mesh, replicated
from tilelli_jax.signals.batching import batches, max_time, on_devices, padded_ids


class Text(NamedTuple):
    """Token ids, and integers that the tap receives as metadata, the same number for each text."""

    ids: Sequence[int]
    metadata: Sequence[int] = ()


class Scored(NamedTuple):
    """Results of one text.

    Attributes:
        nll: f32 `[time − 1]`, NLL of each next token, in nats.
        activations: hook → recorded activations, `[layers, …]`.
    """

    nll: np.ndarray
    activations: dict[str, np.ndarray]


def recording(hooks: tuple[str, ...], layers: tuple[int, ...]) -> MakeTap:
    """Records hooks of some layers at the positions in each text's metadata."""
    return lambda aux_model, metadata: Tap(record=hooks, layers=layers, positions=metadata)


class Scorer:
    """Scores texts with one network; the compiled program is reused between calls.

    Args:
        make_tap: (aux_model, metadata) → tap. It may record only hooks inside the blocks.
        aux_model: a second network that the tap uses, for example an autoencoder.
        nll: whether to compute the NLL. If not, `Scored.nll` is empty and the logits are not computed.
        mesh: devices that share each batch; batch_size is rounded up to a multiple of their number.
    """

    def __init__(self, model: Any, make_tap: MakeTap | None = None, *, aux_model: Any = None,
                 nll: bool = True,
                 batch_size: int = 16, mesh: Mesh | None = None) -> None:
        self.batch_size, self.mesh, self.max_tokens = batch_size, mesh, max_time(model)
        graph, self._params = nnx.split(model)
        self._aux_params: Any
        aux_graph, self._aux_params = (None, None) if aux_model is None else nnx.split(aux_model)

        def run(params: Any, aux_params: Any, ids: jax.Array,
                metadata: jax.Array) -> tuple[jax.Array, Recorded]:
            merged_aux = None if aux_graph is None else nnx.merge(aux_graph, aux_params)
            tap = OFF if make_tap is None else make_tap(merged_aux, metadata)
            losses, recorded = nnx.merge(graph, params).nll(ids, tap)
            return losses if nll else jnp.zeros((len(ids), 0)), recorded
        self._run: Callable = jax.jit(run, out_shardings=None if mesh is None else replicated(mesh))

    def __call__(self, texts: Sequence[Text], *, seed: int | None = None,
                 label: str = "scoring") -> Iterator[tuple[int, Scored]]:
        """Yields (index, result) for each text, in arbitrary order.

        Texts of similar length form a batch, padded on the right, which does not affect a causal network.
        Shows progress.

        Args:
            seed: of a random order of the texts (see `batches`). None: the longest texts first.
            label: label of the progress bar.
        """
        if len({len(text.metadata) for text in texts}) > 1:
            raise ValueError("metadata: expected the same number of values in each text")
        if empty := [i for i, text in enumerate(texts) if not len(text.ids)]:
            raise ValueError(f"ids: expected at least one in every text, found none in text {empty[0]}")
        with progress.shown(len(texts), label, "text") as advance:
            for batch in batches([len(text.ids) for text in texts], self.batch_size, limit=self.max_tokens,
                                 mesh=self.mesh, seed=seed):
                rows = [texts[i] for i in batch.filled]
                arrays = (padded_ids([text.ids for text in rows], batch.time),
                          np.array([text.metadata for text in rows], np.int32).reshape(len(rows), -1))
                nll, recorded = jax.device_get(
                    self._run(self._params, self._aux_params, *on_devices(arrays, self.mesh)))
                for row, i in enumerate(batch.indices):
                    yield i, Scored(nll[row, :len(texts[i].ids) - 1],
                                    {hook: value[:, row] for hook, value in recorded.items()})
                advance(len(batch.indices))


def score(model: Any, texts: Sequence[Text], make_tap: MakeTap | None = None, *, aux_model: Any = None,
          nll: bool = True, seed: int | None = None, batch_size: int = 16, mesh: Mesh | None = None,
          label: str = "scoring") -> Iterator[tuple[int, Scored]]:
    """Scores texts with a new `Scorer`; see there for the arguments."""
    scorer = Scorer(model, make_tap, aux_model=aux_model, nll=nll, batch_size=batch_size, mesh=mesh)
    return scorer(texts, seed=seed, label=label)
