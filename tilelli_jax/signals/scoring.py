"""NLL of texts under a network, with recorded activations, in batches of similar lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.cli import progress
from tilelli_jax.nn.tap import OFF, Recorded, Tap, TapOf
from tilelli_jax.parallel.sharding import Mesh, place_rows, replicated, whole_batch

RUN = 32  # with random order, texts are sorted by length within runs of this number of batches
BUCKET = 16  # lengths are rounded up to multiples of it; each multiple is one compilation


class Text(NamedTuple):
    """Token ids, and whole numbers that the tap receives as metadata, the same number for each text."""

    ids: Sequence[int]
    metadata: Sequence[int] = ()


class Scored(NamedTuple):
    """Results of one text.

    Attributes:
        nats: f32 `[time − 1]`, NLL of each next token, in nats.
        seen: place → recorded activations, `[layers, …]`.
    """

    nats: np.ndarray
    seen: dict[str, np.ndarray]


def max_time(model: Any) -> int | None:
    """The context length of a network with learned positions; None for all others, which have no limit."""
    return model.config.max_seq_len if getattr(model.config, "positions", "") == "learned" else None


def padded_time(longest: int, limit: int | None) -> int:
    """The padded length of a batch: a multiple of BUCKET, to limit the number of compilations."""
    return max(longest, min(-(-longest // BUCKET) * BUCKET, limit or longest + BUCKET))


def recording(places: tuple[str, ...], layers: tuple[int, ...]) -> TapOf:
    """Records places of some layers at the positions in each text's metadata."""
    return lambda aux_model, metadata: Tap(record=places, layers=layers, positions=metadata)


class Scorer:
    """Scores texts with one network; the compiled program is reused between calls.

    Args:
        tap_of: (aux_model, metadata) → tap. It may record only places inside the blocks.
        aux_model: a second network that the tap uses, for example an autoencoder.
        nll: whether to compute the NLL. If not, `nats` is empty and the logits are not computed.
        mesh: devices that share each batch; batch_size is rounded up to a multiple of their number.
    """

    def __init__(self, model: Any, tap_of: TapOf | None = None, *, aux_model: Any = None, nll: bool = True,
                 batch_size: int = 16, mesh: Mesh | None = None) -> None:
        self.rows, self.mesh, self.most = whole_batch(batch_size, mesh), mesh, max_time(model)
        graph, self._params = nnx.split(model)
        self._aux_params: Any
        aux_graph, self._aux_params = (None, None) if aux_model is None else nnx.split(aux_model)

        def run(params: Any, aux_params: Any, ids: jax.Array,
                metadata: jax.Array) -> tuple[jax.Array, Recorded]:
            merged_aux = None if aux_graph is None else nnx.merge(aux_graph, aux_params)
            tap = OFF if tap_of is None else tap_of(merged_aux, metadata)
            nats, recorded = nnx.merge(graph, params).nll(ids, tap)
            return nats if nll else jnp.zeros((len(ids), 0)), recorded
        self._run: Callable = jax.jit(run, out_shardings=None if mesh is None else replicated(mesh))

    def __call__(self, texts: Sequence[Text], *, seed: int | None = None,
                 what: str = "scoring") -> Iterator[tuple[int, Scored]]:
        """Yields (index, result) for each text, in arbitrary order.

        Texts of similar length form a batch, padded on the right, which does not affect a causal network.
        Shows progress.

        Args:
            seed: of a random order of the texts, sorted by length only within runs of RUN batches. None:
                the longest texts first.
            what: label of the progress bar.
        """
        if len({len(text.metadata) for text in texts}) > 1:
            raise ValueError("metadata: expected the same number of values in each text")
        if empty := [i for i, text in enumerate(texts) if not len(text.ids)]:
            raise ValueError(f"ids: expected at least one in every text, found none in text {empty[0]}")
        order, rows, mesh = _order(texts, RUN * self.rows, seed), self.rows, self.mesh
        with progress.shown(len(texts), what, "text") as advance:
            for start in range(0, len(order), rows):
                batch = order[start:start + rows]
                arrays = _padded([texts[i] for i in batch], rows, self.most)
                placed = arrays if mesh is None else tuple(place_rows(array, mesh, rows) for array in arrays)
                nats, recorded = jax.device_get(self._run(self._params, self._aux_params, *placed))
                for row, i in enumerate(batch):
                    yield i, Scored(nats[row, :len(texts[i].ids) - 1],
                                    {place: value[:, row] for place, value in recorded.items()})
                advance(len(batch))


def score(model: Any, texts: Sequence[Text], tap_of: TapOf | None = None, *, aux_model: Any = None,
          nll: bool = True, seed: int | None = None, batch_size: int = 16, mesh: Mesh | None = None,
          what: str = "scoring") -> Iterator[tuple[int, Scored]]:
    """Scores texts with a new `Scorer`; see there for the arguments."""
    scorer = Scorer(model, tap_of, aux_model=aux_model, nll=nll, batch_size=batch_size, mesh=mesh)
    return scorer(texts, seed=seed, what=what)


def _order(texts: Sequence[Text], run: int, seed: int | None) -> list[int]:
    """The longest first, to allocate most memory at once; with a seed, random order sorted within runs."""
    if seed is None:
        return sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    shuffled = np.random.default_rng(seed).permutation(len(texts)).tolist()
    return [i for start in range(0, len(shuffled), run)
            for i in sorted(shuffled[start:start + run], key=lambda i: -len(texts[i].ids))]


def _padded(texts: Sequence[Text], rows: int, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, int32 `[rows, time]`, padded with zeros, and metadata, int32 `[rows, n]`."""
    time = padded_time(max(len(text.ids) for text in texts), limit)
    ids, metadata = np.zeros((rows, time), np.int32), np.zeros((rows, len(texts[0].metadata)), np.int32)
    for row, text in enumerate(texts):
        ids[row, :len(text.ids)], metadata[row] = text.ids, text.metadata
    return ids, metadata
