"""Signal C: does what a network is about to say survive noise in the middle of its depth?

A prompt is read once as it is and k times with noise in the residual stream: at every position, before the
first layer of the band, N(0, (σ · RMS of the stream there)²). What is told is the mean divergence of the
next token's distribution, KL(as it is ‖ with noise), in nats: 0 where nothing moves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import Mesh, place_rows, replicated, whole_batch
from tilelli_jax.signals.crystallisation import band
from tilelli_jax.signals.lens import CHUNK, logit_lens_from
from tilelli_jax.signals.prompts import check_lengths
from tilelli_jax.signals.scoring import max_time, padded_time


class Robustness:
    """Of one network; what was compiled serves the next call.

    Args:
        sigma: size of the noise beside the stream's.
        k: readings with noise.
        layer: before which the noise is added; by default the band's first.
        seed: of the noise. A prompt's goes with its number, not with its batch.
        mesh: devices to share each batch; batch_size is rounded up to a multiple of their number.
    """

    def __init__(self, model: Any, *, sigma: float = 0.1, k: int = 4, layer: int | None = None, seed: int = 0,
                 batch_size: int = 16, chunk: int = CHUNK, mesh: Mesh | None = None) -> None:
        if sigma < 0 or k < 1:
            raise ValueError(f"sigma and k: expected sigma ≥ 0 and k ≥ 1, found {sigma} and {k}")
        at = band(model.config.n_layers)[0] if layer is None else layer
        if not 0 <= at < model.config.n_layers:
            raise ValueError(f"layer: expected 0 to {model.config.n_layers - 1}, found {at}")
        self.batch_size, self.mesh = whole_batch(batch_size, mesh), mesh
        self.key, self.most = jax.random.key(seed), max_time(model)
        graph, self._params = nnx.split(model)

        def read(params: Any, ids: jax.Array, last: jax.Array, keys: jax.Array) -> jax.Array:
            model = nnx.merge(graph, params)

            def stream(keys: jax.Array | None) -> jax.Array:
                def noisy(value: jax.Array, here: int | None) -> jax.Array:
                    if here != at or keys is None:
                        return value
                    size = jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32)), -1, keepdims=True))
                    drawn = jax.vmap(lambda key: jax.random.normal(key, value.shape[1:]))(keys)
                    return value + (sigma * size * drawn).astype(value.dtype)
                tap = Tap(record=("resid_post",), positions=last[:, None], edit={"resid_pre": noisy})
                return model.tapped(ids, tap)[1]["resid_post"][-1, :, 0]
            # One reading after the other: the memory is that of one.
            noised = jax.lax.map(lambda i: stream(jax.vmap(jax.random.fold_in, (0, None))(keys, i)),
                                 jnp.arange(k))
            rows = jnp.concatenate([stream(None), noised.reshape(-1, noised.shape[-1])])
            batch = len(ids)
            again = jnp.concatenate([rows[:batch]] * k)  # each as it is, against the reading with noise
            _, divergence = logit_lens_from(model.unembedding(), jnp.concatenate([again, rows[batch:]]),
                                      (jnp.arange(2 * k * batch) + k * batch) % (2 * k * batch), chunk=chunk)
            return jnp.mean(divergence[:k * batch].reshape(k, batch), axis=0)
        self._read = jax.jit(read, out_shardings=None if mesh is None else replicated(mesh))

    def __call__(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None) -> np.ndarray:
        """Token ids of each prompt → mean divergence, f32 `[prompts]`, nats.

        Args:
            numbers: of the prompts in the random stream; by default 0, 1, ….

        Raises:
            ValueError: a prompt is empty, or longer than the network reads.
        """
        check_lengths(prompts, self.most)
        known = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
        found = np.zeros(len(prompts), np.float32)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start:start + self.batch_size]
            rows = [*chosen, *[chosen[-1]] * (self.batch_size - len(chosen))]
            time = padded_time(len(prompts[chosen[0]]), self.most)
            ids = np.zeros((len(rows), time), np.int32)
            for row, i in enumerate(rows):
                ids[row, :len(prompts[i])] = prompts[i]
            keys = jax.vmap(lambda n: jax.random.fold_in(self.key, n))(jnp.asarray(known[rows], jnp.uint32))
            last = np.array([len(prompts[i]) - 1 for i in rows], np.int32)
            given: tuple[Any, ...] = ids, last
            if self.mesh is not None:
                given = tuple(place_rows(array, self.mesh, len(rows)) for array in given)
            found[chosen] = np.asarray(self._read(self._params, *given, keys))[:len(chosen)]
        return found
