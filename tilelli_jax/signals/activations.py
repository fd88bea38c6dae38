"""Activations of many texts as rows: what autoencoders learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import Mesh
from tilelli_jax.signals.places import check_place
from tilelli_jax.signals.scoring import Text, score


def rows_of(model: Any, texts: Sequence[Sequence[int]], *, place: str, layer: int,
            numbers: Sequence[int] | None = None, skip: int = 1, seed: int = 0, dtype: Any = np.float16,
            batch_size: int = 16, mesh: Mesh | None = None) -> Iterator[np.ndarray]:
    """The activations at each text's positions, `[positions, d_model]`, text by text in random order.

    `tilelli_jax.data.activations.write_activations` takes them as they come.

    Args:
        texts: token ids.
        place: inside the blocks, such as resid_post.
        numbers: what the texts are called where one goes wrong; by default 0, 1, ….
        skip: leave out so many positions at the beginning of each text. A network without a token for
            the beginning keeps a value of enormous length at the first position, which would be most of
            the variance that an autoencoder explains.
        seed: of the order, so that the last rows, which are held out in training, are as any others.

    Raises:
        InputError: a text's values are not finite as `dtype`; the text and the layer are named.
    """
    check_place(model, place, layer)
    given = [Text(ids) for ids in texts if len(ids) > skip]
    known = [i if numbers is None else numbers[i] for i, ids in enumerate(texts) if len(ids) > skip]
    found = score(model, given, lambda aux_model, beside: Tap(record=(place,), layers=(layer,)), nll=False,
                  seed=seed, batch_size=batch_size, mesh=mesh, what="collecting")
    for i, result in found:
        with np.errstate(over="ignore"):  # the next lines name it
            rows = result.seen[place][0, skip:len(given[i].ids)].astype(dtype)
        if not np.isfinite(rows.astype(np.float32)).all():
            raise InputError(f"text {known[i]}, layer {layer}: activations are not finite as "
                             f"{np.dtype(dtype)}")
        yield rows
