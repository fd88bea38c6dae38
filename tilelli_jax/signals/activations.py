"""Collects the activations of many texts as rows, the training data of autoencoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.nn.hooks import Tap, check_hook
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.signals.scoring import Text, score


def activation_rows(model: Any, texts: Sequence[Sequence[int]], *, hook: str, layer: int,
                    item_ids: Sequence[int] | None = None, skip: int = 1, seed: int = 0,
                    dtype: Any = np.float16, batch_size: int = 16,
                    mesh: Mesh | None = None) -> Iterator[np.ndarray]:
    """Yields each text's activations, `[positions, d_model]`, text by text in random order.

    `tilelli_jax.data.activations.write_activations` writes them to disk.

    Args:
        texts: token ids.
        hook: a hook inside the blocks, such as resid_post.
        item_ids: identifier of each text in error messages; by default 0, 1, ….
        skip: number of positions to skip at the beginning of each text. A network without a BOS token has
            an activation of very large norm at the first position, which would dominate the variance that
            an autoencoder explains.
        seed: of the random order, so that the last rows, which training holds out, are a random sample.

    Raises:
        InputError: the activations of a text are not finite as `dtype`; the message names text and layer.
    """
    check_hook(model, hook, layer)
    used = [Text(ids) for ids in texts if len(ids) > skip]
    used_ids = [i if item_ids is None else item_ids[i] for i, ids in enumerate(texts) if len(ids) > skip]
    results = score(model, used, lambda aux_model, metadata: Tap(record=(hook,), layers=(layer,)), nll=False,
                    seed=seed, batch_size=batch_size, mesh=mesh, label="collecting")
    for i, result in results:
        with np.errstate(over="ignore"):  # the next lines report overflow
            rows = result.activations[hook][0, skip:len(used[i].ids)].astype(dtype)
        if not np.isfinite(rows.astype(np.float32)).all():
            raise InputError(f"text {used_ids[i]}, layer {layer}: activations are not finite as "
                             f"{np.dtype(dtype)}")
        yield rows
