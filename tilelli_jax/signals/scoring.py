"""How surprised a network is by texts, and its activations on the way, in batches of like lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax import progress
from tilelli_jax.nn.tap import OFF, Recorded, Tap, TapOf
from tilelli_jax.sharding import Mesh, place_rows, replicated, whole_batch

RUN = 32  # batches that are sorted by length where the order is random
BUCKET = 16  # lengths are rounded up to multiples of it: as many compilations as there are multiples


class Text(NamedTuple):
    """Token ids, and what a tap is to know of them: whole numbers, as many in each text."""

    ids: Sequence[int]
    beside: Sequence[int] = ()


class Scored(NamedTuple):
    """What became of one text: nats `[time − 1]` f32, and what the tap recorded of it, `[layers, …]`."""

    nats: np.ndarray
    seen: dict[str, np.ndarray]


def max_time(model: Any) -> int | None:
    """How many ids a network with learned positions reads; None where there is no end to them."""
    return model.config.max_seq_len if getattr(model.config, "positions", "") == "learned" else None


def padded_time(longest: int, most: int | None) -> int:
    """The length that a batch is padded to: one of a few, so that few are compiled."""
    return max(longest, min(-(-longest // BUCKET) * BUCKET, most or longest + BUCKET))


def recording(places: tuple[str, ...], layers: tuple[int, ...]) -> TapOf:
    """Records places of some layers at the positions that stand beside each text."""
    return lambda aux_model, beside: Tap(record=places, layers=layers, positions=beside)


class Scorer:
    """Asks one network, and keeps what was compiled for the next call.

    Args:
        tap_of: the tap; of what it records, places inside the blocks.
        aid: a second network that the tap uses, an autoencoder perhaps.
        surprise: whether nats are wanted; if not they are empty, and what leads to the logits alone is
            not computed.
        mesh: devices to share each batch; batch_size is rounded up to a multiple of their number.
    """

    def __init__(self, model: Any, tap_of: TapOf | None = None, *, aux_model: Any = None, nll: bool = True,
                 batch_size: int = 16, mesh: Mesh | None = None) -> None:
        self.rows, self.mesh, self.most = whole_batch(batch_size, mesh), mesh, max_time(model)
        graph, self._params = nnx.split(model)
        self._aid_params: Any
        aux_graph, self._aid_params = (None, None) if aux_model is None else nnx.split(aux_model)

        def look(params: Any, aux_params: Any, ids: jax.Array,
                 beside: jax.Array) -> tuple[jax.Array, Recorded]:
            second = None if aux_graph is None else nnx.merge(aux_graph, aux_params)
            tap = OFF if tap_of is None else tap_of(second, beside)
            nats, seen = nnx.merge(graph, params).nats(ids, tap)
            return nats if nll else jnp.zeros((len(ids), 0)), seen
        self._run: Callable = jax.jit(look, out_shardings=None if mesh is None else replicated(mesh))

    def __call__(self, texts: Sequence[Text], *, seed: int | None = None,
                 what: str = "scoring") -> Iterator[tuple[int, Scored]]:
        """Each text's surprise and what the tap sees of it, in no order of theirs: (index, result).

        Texts of like length go through the network together, padded on the right, which a causal network
        does not see. Shows progress.

        Args:
            seed: read the texts in random order, sorted by length only within runs of RUN batches; None:
                the longest first.
        """
        if len({len(text.beside) for text in texts}) > 1:
            raise ValueError("beside: expected as many numbers in each text")
        if empty := [i for i, text in enumerate(texts) if not len(text.ids)]:
            raise ValueError(f"ids: expected at least one in every text, found none in text {empty[0]}")
        order, rows, mesh = _order(texts, RUN * self.rows, seed), self.rows, self.mesh
        with progress.shown(len(texts), what, "text") as advance:
            for start in range(0, len(order), rows):
                chosen = order[start:start + rows]
                given = _padded([texts[i] for i in chosen], rows, self.most)
                placed = given if mesh is None else tuple(place_rows(array, mesh, rows) for array in given)
                nats, seen = jax.device_get(self._run(self._params, self._aid_params, *placed))
                for row, i in enumerate(chosen):
                    yield i, Scored(nats[row, :len(texts[i].ids) - 1],
                                    {place: value[:, row] for place, value in seen.items()})
                advance(len(chosen))


def score(model: Any, texts: Sequence[Text], tap_of: TapOf | None = None, *, aux_model: Any = None,
          nll: bool = True, seed: int | None = None, batch_size: int = 16, mesh: Mesh | None = None,
          what: str = "scoring") -> Iterator[tuple[int, Scored]]:
    """What a Scorer of these says of texts, once."""
    scorer = Scorer(model, tap_of, aux_model=aux_model, nll=nll, batch_size=batch_size, mesh=mesh)
    return scorer(texts, seed=seed, what=what)


def _order(texts: Sequence[Text], run: int, seed: int | None) -> list[int]:
    """The longest first, so that memory is asked for at once; by runs where the order is to be random."""
    if seed is None:
        return sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    drawn = np.random.default_rng(seed).permutation(len(texts)).tolist()
    return [i for start in range(0, len(drawn), run)
            for i in sorted(drawn[start:start + run], key=lambda i: -len(texts[i].ids))]


def _padded(texts: Sequence[Text], rows: int, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 `[rows, time]`, zeros where there is nothing, and what stands beside, int32 `[rows, n]`."""
    time = padded_time(max(len(text.ids) for text in texts), most)
    ids, beside = np.zeros((rows, time), np.int32), np.zeros((rows, len(texts[0].beside)), np.int32)
    for row, text in enumerate(texts):
        ids[row, :len(text.ids)], beside[row] = text.ids, text.beside
    return ids, beside
